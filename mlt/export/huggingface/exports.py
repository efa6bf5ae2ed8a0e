"""`mlt export --format huggingface`: a model directory that transformers loads without code of ours."""

import json
from pathlib import Path

import jax
import numpy as np

from mlt.errors import UserError
from mlt.export.huggingface.registry import write_config
from mlt.export.huggingface.weights import read_model, write_model
from mlt.train.load import load_model


def export_huggingface(run_dir: Path, target: Path, *, step: int | None = None) -> str:
    """Write a checkpoint as config.json, model.safetensors and tokenizer, and read it back bit for bit.

    Returns:
        What was written, for the terminal.

    Raises:
        UserError: no architecture of transformers says all of the model's config, there is no checkpoint, or `target`
            holds files or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not an empty directory; name another one, or empty it")
    config, model, step = load_model(run_dir, step)
    architecture, values = write_config(config.model)
    tokenizer = config.data.tokenizer
    values |= {"max_position_embeddings": config.data.sequence_length}
    values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    try:
        tensors = write_model(config.model, model, architecture, values, target)
        tokenizer.save(target)
        again = read_model(target)[1]
        equal = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True))
        if not equal:
            raise RuntimeError(f"{target}: the exported weights are not the run's; please report this")
        receipt = {"step": step, "architecture": architecture.class_name, "tensors": len(tensors), "equal_bit_for_bit": True}
        (target / "receipt.json").write_text(json.dumps(receipt, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    files = "\n".join(f"  {path.name:<24}{path.stat().st_size:>14,} bytes" for path in sorted(target.iterdir()))
    return (
        f"step {step} of {run_dir} as {architecture.class_name} in {target}:\n{files}\n"
        f"read back: {len(tensors)} tensors equal bit for bit"
    )
