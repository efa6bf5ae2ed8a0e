"""Write the parity goldens of single layers: what flash-linear-attention computes, run on a CPU by Triton's interpreter.

    git clone https://github.com/fla-org/flash-linear-attention PATH
    python tools/parity_fla.py --fla PATH [NAME ...]

needs torch 2.13.0, triton 3.5, einops, transformers, safetensors and numpy < 2.4 (docs/parity.md). The layers and their
kernels are run as they are, but that no configuration of a kernel is timed (the first one is taken), and that sorts are
stable, see `prepare`. Weights are made from names and shapes as in tools/parity_goldens.py.
"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from parity_goldens import LENGTHS, golden_path, weights

_COMMON = {"hidden_size": 32, "norm_eps": 1e-6}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fla_gla": ("gla", "GatedLinearAttention", {**_COMMON, "num_heads": 2, "gate_low_rank_dim": 4, "gate_logit_normalizer": 4}),
    "fla_delta_net": ("delta_net", "DeltaNet", {**_COMMON, "num_heads": 2, "expand_k": 0.5}),
    "fla_gated_delta_net": (
        "gated_deltanet",
        "GatedDeltaNet",
        {**_COMMON, "num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5, "allow_neg_eigval": True},
    ),
    "fla_kda": ("kda", "KimiDeltaAttention", {**_COMMON, "num_heads": 4, "head_dim": 8, "expand_v": 1.5}),
    "fla_kda_bounded": (
        "kda",
        "KimiDeltaAttention",
        {**_COMMON, "num_heads": 4, "head_dim": 8, "expand_v": 1.5, "safe_gate": True, "lower_bound": -5.0},
    ),
    "fla_mom": (
        "mom",
        "MomAttention",
        {**_COMMON, "num_heads": 2, "head_dim": 8, "expand_v": 2, "num_memories": 3, "shared_mem": True, "conv_size": 1},
    ),
}
"""Name of the golden -> (file of fla/layers, class, arguments)."""


def prepare(checkout: Path) -> None:
    """Make `import fla` find the checkout, and its kernels run on a CPU. Before that import.

    MomAttention sorts tokens by memory with a sort that need not keep their order, and on a CPU does not: a memory then reads
    tokens of the future. All sorts are made stable here.
    """
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    sys.path.insert(0, str(checkout))
    import torch
    from triton.runtime.autotuner import Autotuner

    init, argsort = Autotuner.__init__, torch.Tensor.argsort

    def first_only(self: Any, fn: Any, arg_names: Any, configs: Any, *more: Any, **options: Any) -> None:
        init(self, fn, arg_names, configs[:1], *more, **options)
        self.cache_results = False

    Autotuner.__init__ = first_only
    torch.Tensor.argsort = lambda self, *more, **options: argsort(self, *more, **{**options, "stable": True})


def make(name: str, seed: int) -> dict[str, np.ndarray]:
    """Everything that a golden holds: inputs of a layer, and its outputs for each document alone."""
    import fla
    import torch
    import triton

    module, kind, arguments = CASES[name]
    layer = getattr(importlib.import_module(f"fla.layers.{module}"), kind)(**arguments).eval()
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    layer.load_state_dict({key: torch.from_numpy(array) for key, array in weights(shapes, seed).items()})
    rng = np.random.Generator(np.random.Philox(key=seed))
    x = rng.standard_normal((sum(LENGTHS), arguments["hidden_size"]), np.float32)
    ends = torch.tensor([0, *np.cumsum(LENGTHS)])

    def output(rows: np.ndarray, **more: Any) -> np.ndarray:
        with torch.no_grad():
            return layer(torch.from_numpy(rows)[None], **more)[0][0].numpy()

    alone = np.concatenate([output(part) for part in np.split(x, np.cumsum(LENGTHS)[:-1])])
    packed = output(x, cu_seqlens=ends)
    versions = {"torch": torch.__version__, "fla": fla.__version__, "triton": triton.__version__, "numpy": np.__version__}
    return {
        "config": np.array(json.dumps({"layer": kind, **arguments})),
        "shapes": np.array(json.dumps(shapes)),
        "seed": np.array(seed),
        "versions": np.array(json.dumps(versions)),
        "x": x,
        "lengths": np.array(LENGTHS),
        "output": alone,
        "packed_error": np.array(np.abs(packed - alone).max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fla", type=Path, required=True, help="checkout of fla-org/flash-linear-attention")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; all of them by default")
    given = parser.parse_args()
    prepare(given.fla)
    for case in given.names or CASES:
        golden = make(case, seed=1)
        np.savez_compressed(golden_path(case), **golden)
        size, largest = golden_path(case).stat().st_size, np.abs(golden["output"]).max()
        print(f"{case:<24}{size:>8} bytes  largest output {largest:6.2f}  packed by fla: {golden['packed_error']:.1e}")
