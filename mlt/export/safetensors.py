"""`mlt export`: a plain directory of weights, config, tokenizer and parameter table, with a receipt that it is the run's model.

Files: `model.safetensors`, `config.json`, `config.yaml` (the whole run), `tokenizer.json`, `tokenizer_config.json`,
`parameters.tsv`, `receipt.json`.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mlt import __version__
from mlt.config.dump import config_hash, from_yaml, to_yaml
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.export.names import from_tensors, to_tensors
from mlt.mixers.base import Context
from mlt.model.count import parameter_table
from mlt.model.lm import LM
from mlt.model.remat import Remat
from mlt.nn.float8 import E4M3, E8M0
from mlt.parallel.rules import Rules
from mlt.train.load import load_model
from mlt.train.setup import describe_model

TYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_},
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    **{"F8_E4M3": E4M3, "F8_E8M0": E8M0},
}
"""NumPy types of what an export holds, by their names in the format."""

RECEIPT_TEXT = "def main():\n    return sum(range(10))\n"


def export_run(run_dir: Path, target: Path, *, step: int | None = None) -> str:
    """Export a checkpoint, read the result back, and compare its logits with the run's bit for bit.

    Returns:
        What was written, for the terminal.

    Raises:
        UserError: there is no checkpoint, or `target` holds files or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not an empty directory; name another one, or empty it")
    config, model, step = load_model(run_dir, step)
    try:
        _write(config, model, step, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    receipt = _receipt(config, model, target)
    (target / "receipt.json").write_text(json.dumps({"step": step, **receipt}, indent=2) + "\n")
    files = "\n".join(f"  {path.name:<24}{path.stat().st_size:>14,} bytes" for path in sorted(target.iterdir()))
    return f"step {step} of {run_dir} in {target}:\n{files}\nread back: {receipt['logits']:,} logits equal bit for bit"


def read_export(directory: Path) -> tuple[RunConfig, LM]:
    """The config and model of an exported directory.

    Raises:
        UserError: a file or tensor is missing.
    """
    try:
        config = from_yaml((directory / "config.yaml").read_text(), root=RunConfig)
        tensors = read_tensors(directory / "model.safetensors")
        return config, from_tensors(config.model, describe_model(config), tensors)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{directory}: is not a whole export: {error}") from error


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, mapped into memory. The library's own reader for NumPy has no 8-bit floats."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, mode="r", offset=8 + size)
    return {name: _viewed(data, **about) for name, about in header.items()}


def _viewed(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    return data[slice(*data_offsets)].view(TYPES[dtype]).reshape(shape)


def _write(config: RunConfig, model: LM, step: int, target: Path) -> None:
    from safetensors.numpy import save_file

    target.mkdir(parents=True, exist_ok=True)
    tensors = to_tensors(config.model, model)
    metadata = {"format": "mlt", "step": str(step), "config_hash": config_hash(config)}
    partial = target / "model.safetensors.partial"
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, target / "model.safetensors")
    description = {
        "model_type": "mlt",
        "mlt_version": __version__,
        "vocab_size": config.model.vocab_size,
        "hidden_size": config.model.d_model,
        "num_hidden_layers": config.model.stack.num_layers,
        "max_position_embeddings": config.data.sequence_length,
        "tie_word_embeddings": config.model.tie_embeddings,
        "layers": [[type(mixer).__name__ for mixer in block.mixers] for block in config.model.stack.layers()],
        "torch_dtype": "float32",
    }
    (target / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    (target / "config.yaml").write_text(to_yaml(config))
    config.data.tokenizer.save(target)
    rows = [("name", "shape", "axes", "init", "group"), *parameter_table(describe_model(config))]
    (target / "parameters.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))


def _receipt(config: RunConfig, model: LM, target: Path) -> dict[str, object]:
    """Logits of a fixed text from the run's model and from the exported files."""
    _, again = read_export(target)
    tokenizer = config.data.tokenizer
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(RECEIPT_TEXT)], np.int32)[None]
    context = Context(ids, np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None], Rules(None), False)
    run = jax.jit(lambda model: model.logits(model(context, dtype=jnp.dtype("float32"), remat=Remat(mode="none"))[0]))
    ours, theirs = np.asarray(run(model)), np.asarray(run(again))
    if not np.array_equal(ours, theirs):
        raise RuntimeError(f"{target}: the exported weights do not reproduce the run's logits; please report this")
    return {"text": RECEIPT_TEXT, "logits": int(ours.size), "largest_logit": float(ours.max()), "equal_bit_for_bit": True}
