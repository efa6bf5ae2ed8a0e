"""Print the table of docs/parity.md: the largest difference of our logits from each golden's, alone and packed.

    python tools/parity_errors.py [NAME ...]

needs no torch: it reads tests/parity/golden.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent


def load_test() -> Any:
    """The parity test as a module: what it compares is what is printed."""
    spec = importlib.util.spec_from_file_location("mlt_parity_test", ROOT / "tests" / "parity" / "test_huggingface.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs_packed(error: float) -> str:
    """How transformers takes two documents in one row on a CPU."""
    if np.isnan(error):
        return "refused"
    return "equal" if error < 1e-4 else f"leaks ({error:.1f})"


if __name__ == "__main__":
    test = load_test()
    print("| golden | largest logit | error alone | error packed | packed by transformers |\n|---|---|---|---|---|")
    for name in sys.argv[1:] or test.tool.CASES:
        stored, _, _, _, model = test.golden(name)
        found = test.our_logits(model, stored["ids"], stored["lengths"])
        alone, *packed = (np.abs(logits - stored["logits"]).max() for logits in found.values())
        largest, how = np.abs(stored["logits"]).max(), theirs_packed(float(stored["packed_error"]))
        print(f"| `{name}` | {largest:.1f} | {alone:.1e} | {max(packed):.1e} | {how} |", flush=True)
    print(json.loads(str(stored["versions"])))
