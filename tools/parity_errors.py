"""Print the tables of docs/parity.md: the largest difference of our outputs from each golden's, alone and packed.

    python tools/parity_errors.py [NAME ...]

needs no torch: it reads tests/parity/golden.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # where the tests find what they share


def load_test(name: str) -> Any:
    """A parity test as a module: what it compares is what is printed."""
    spec = importlib.util.spec_from_file_location(f"mlt_parity_{name}", ROOT / "tests" / "parity" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs_packed(error: float) -> str:
    """How the other library takes two documents in one row on a CPU."""
    if np.isnan(error):
        return "refused"
    return "equal" if error < 1e-4 else f"leaks ({error:.1f})"


def row(name: str, stored: dict[str, np.ndarray], wanted: np.ndarray, found: dict[str, np.ndarray]) -> str:
    alone, *packed = (np.abs(outputs - wanted).max() for outputs in found.values())
    allowed = "1e-4" if "rounding" not in stored else f"1e-4 + {stored['rounding'].max():.1e}"
    how = theirs_packed(float(stored["packed_error"]))
    return f"| `{name}` | {np.abs(wanted).max():.1f} | {alone:.1e} | {max(packed):.1e} | {allowed} | {how} |"


def heading(of: str, library: str) -> str:
    return f"| golden | largest {of} | error alone | error packed | allowed | packed by {library} |\n|---|---|---|---|---|---|"


if __name__ == "__main__":
    chosen, versions = sys.argv[1:], "{}"
    models, layers = load_test("test_huggingface"), load_test("test_fla")
    print(heading("logit", "transformers"))
    for name in [name for name in models.parity.CASES if not chosen or name in chosen]:
        stored, _, _, _, model = models.golden(name)
        print(row(name, stored, stored["logits"], models.our_logits(model, stored["ids"], stored["lengths"])), flush=True)
        versions = str(stored["versions"])
    print(versions)
    print("\n" + heading("output", "fla"))
    for name in [name for name in layers.CASES if not chosen or name in chosen]:
        stored, mixer = layers.golden(name)
        print(row(name, stored, stored["output"], layers.our_outputs(mixer, stored["x"], stored["lengths"])), flush=True)
        versions = str(stored["versions"])
    print(versions)
