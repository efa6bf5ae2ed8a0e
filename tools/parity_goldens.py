"""Write the parity goldens: what transformers computes on the CPU for a small model of each architecture.

    python tools/parity_goldens.py [NAME ...]

needs torch 2.13.0 and transformers (see docs/parity.md). Weights are not stored: both sides make them from the names and
shapes of the tensors on disk, by `weights` below, so that a golden is its config.json, two documents and their logits.
"""

import contextlib
import json
import math
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from parity_cases import CASES, IN_FLOAT64

FOLDER = Path(__file__).parent.parent / "tests" / "parity" / "golden"
LENGTHS = (13, 18)


def golden_path(name: str) -> Path:
    return FOLDER / f"{name}.npz"


def weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Float32 tensors far from any default initialization, the same on every machine.

    Uniform draws of 24 bits from a counter-based generator, scaled so that a matrix keeps the size of its input.
    """
    return {name: _draw(name, tuple(shape), seed) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    raw = np.random.Philox(key=seed * 2**32 + zlib.crc32(name.encode())).random_raw(math.prod(shape))
    unit = (raw >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0
    leaf = name.rsplit(".", 1)[-1]
    matrix = len(shape) > 1
    center, spread = 0.0, math.sqrt(3.0 / shape[-1]) if matrix else 0.4
    if "embed" in name:
        spread = 0.6
    elif "conv1d" in name and matrix:
        spread = 0.8
    elif leaf in ("D", "weight") and not matrix:
        center, spread = 1.0, 0.5
    elif leaf == "e_score_correction_bias":
        spread = 0.2
    elif leaf == "A_log":
        center, spread = 0.5, 1.0
    elif leaf == "dt_bias" or name.endswith("dt_proj.bias"):
        center, spread = -0.5, 1.0
    elif leaf == "recurrent_param":
        center, spread = -3.0, 1.5
    return (center + spread * unit).astype(np.float32).reshape(shape)


def documents(vocab_size: int, seed: int) -> list[np.ndarray]:
    """Two documents of token ids."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    return [rng.integers(3, vocab_size, length) for length in LENGTHS]


def saved_form(kind: str, fields: dict[str, Any], directory: Path) -> dict[str, tuple[int, ...]]:
    """Save a fresh model of a config as transformers does; names and shapes of its tensors on disk."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).save_pretrained(directory)
    with safe_open(directory / "model.safetensors", "np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def load(directory: Path) -> Any:
    """The model that transformers reads from a directory, in float32; every tensor must be used."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    left = {key: value for key, value in info.items() if value}
    if left:
        raise RuntimeError(f"{directory}: transformers reports {left}")
    return model.eval()


def logits(model: Any, ids: np.ndarray, **more: Any) -> np.ndarray:
    """(T, V) in the model's type."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids)[None], use_cache=False, **more).logits[0].numpy()


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Whatever asks torch for float32 gets float64: models of transformers compute norms, decays and softmax in float32."""
    import torch

    single = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = single
        torch.set_default_dtype(torch.float32)


def reference(model: Any, parts: list[np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits (T, V) of the documents, each alone, and what float32 may add to their error at each token (T,).

    For most goldens nothing: the first are float32 then. For those of IN_FLOAT64 the second is the largest change, in exact
    arithmetic, that eight draws of a relative error of up to 2^-24 on every weight, as one rounding to float32 makes, have
    on the token's logits. No computation in float32 can be held to less. It turns the model into one of float64.
    """
    import torch

    if name not in IN_FLOAT64:
        alone = np.concatenate([logits(model, part) for part in parts])
        return alone, np.zeros(len(alone))
    model.set_experts_implementation("eager")
    model.double()
    exact = [parameter.detach().clone() for parameter in model.parameters()]
    with float64():
        alone, largest = np.concatenate([logits(model, part) for part in parts]), np.zeros(sum(map(len, parts)))
        for draw in range(8):
            generator = torch.Generator().manual_seed(draw)
            for parameter, value in zip(model.parameters(), exact, strict=True):
                error = 2 * torch.rand(value.shape, generator=generator) - 1
                parameter.data = value * (1 + 2**-24 * error)
            rounded = np.concatenate([logits(model, part) for part in parts])
            largest = np.maximum(largest, np.abs(rounded - alone).max(-1))
    return alone, largest


def packed_logits(model: Any, parts: list[np.ndarray]) -> np.ndarray | None:
    """(T, V) of the documents in one row, told apart by their positions and cumulative lengths.

    None where transformers refuses that without CUDA kernels.
    """
    import torch

    positions = np.concatenate([np.arange(len(part)) for part in parts])
    index = np.concatenate([np.full(len(part), number, np.int32) for number, part in enumerate(parts)])
    ends = torch.tensor([0, *np.cumsum([len(part) for part in parts])], dtype=torch.int32)
    longest = max(map(len, parts))
    more = {
        "position_ids": torch.from_numpy(positions)[None],
        "seq_idx": torch.from_numpy(index)[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    try:
        return logits(model, np.concatenate(parts), **more)
    except ValueError as error:
        if "can't keep packed sequences apart" not in str(error):
            raise
        return None


def make(name: str, seed: int) -> dict[str, np.ndarray]:
    """Everything that a golden holds."""
    import torch
    import transformers
    from safetensors.numpy import save_file

    kind, fields = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        shapes = saved_form(kind, fields, directory)
        save_file(weights(shapes, seed), directory / "model.safetensors", metadata={"format": "pt"})
        model = load(directory)
        config = (directory / "config.json").read_text()
    parts = documents(fields["vocab_size"], seed)
    packed = packed_logits(model, parts)
    apart = np.concatenate([logits(model, part) for part in parts])
    wanted, rounding = reference(model, parts, name)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    more = {"rounding": rounding, "float32_error": np.abs(apart - wanted).max()} if name in IN_FLOAT64 else {}
    return more | {
        "config": np.array(config),
        "shapes": np.array(json.dumps(shapes)),
        "seed": np.array(seed),
        "versions": np.array(json.dumps(versions)),
        "ids": np.concatenate(parts),
        "lengths": np.array(LENGTHS),
        "logits": wanted,
        "packed_error": np.array(np.nan if packed is None else np.abs(packed - apart).max()),
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in sys.argv[1:] or CASES:
        golden = make(case, seed=1)
        np.savez_compressed(golden_path(case), **golden)
        size, largest = golden_path(case).stat().st_size, np.abs(golden["logits"]).max()
        print(f"{case:<24}{size:>8} bytes  largest logit {largest:6.2f}  packed by transformers: {golden['packed_error']:.1e}")
        if case in IN_FLOAT64:
            print(f"{'':<24}transformers' float32 is {golden['float32_error']:.1e} off its float64")
