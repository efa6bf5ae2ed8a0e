"""Whether the compression of tokens that a checkpoint was trained with is that of the tokenizer at hand."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mlt.checkpoint.digest import part_digest, text_of
from mlt.checkpoint.layout import CheckpointError, committed_steps, read_leaves
from mlt.checkpoint.leaves import flatten
from mlt.errors import UserError
from mlt.nn.param import named_leaves

TOKEN_MAP = "token_map"


def check_token_maps(directory: Path, specs: Any, tokenizer: Any, *, step: int | None = None) -> None:
    """Compare digests, before any array is read or made. What cannot be read here is left to the restore.

    Args:
        directory: of the checkpoints.
        specs: the described model.
        tokenizer: of the config, for the message.
        step: of the checkpoint; the newest by default.

    Raises:
        UserError: a layer was trained with another map; its rows would be read for other n-grams.
    """
    maps = {name: spec for name, spec in named_leaves(specs) if name.endswith(f".{TOKEN_MAP}")}
    steps = committed_steps(directory) if maps else []
    if not steps or (step is not None and step not in steps):
        return
    saved: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):
        saved = read_leaves(directory, steps[-1] if step is None else step)
    paths = dict(zip(dict(named_leaves(specs)), flatten(_shapes(specs), prefix="model/"), strict=True))
    for name, spec in maps.items():
        leaf = saved.get(paths[name])
        if leaf is not None and leaf.shape == spec.shape and leaf.digest != _digest(spec.make(0, name)):
            raise UserError(
                f"{directory}: step {steps[-1] if step is None else step} was trained with another compression of tokens than "
                f"{type(tokenizer).__name__} gives now ({name}, {spec.shape[-1]} tokens): the tokenizer's files have changed, or "
                "this Python has other Unicode tables. Bring back the files and the Python version that the run was started with"
            )


def _digest(values: np.ndarray) -> str:
    return text_of(part_digest(values, [0] * values.ndim, values.shape))


def _shapes(specs: Any) -> Any:
    return jax.tree.map(lambda spec: spec.abstract(), specs)
