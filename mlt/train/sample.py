"""Samples of a run: text drawn by its model in training, and by `mlt generate` afterwards."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np

from mlt.config.run import RunConfig
from mlt.data.tokenize import Tokenizer
from mlt.model.generate import generate
from mlt.model.lm import LM
from mlt.parallel.rules import Rules


def draw_text(config: RunConfig, model: LM, rules: Rules, prompt: str, *, tokens: int, temperature: float, key: jax.Array) -> str:
    """What the model says after a prompt that starts a document; the prompt is not repeated."""
    tokenizer = config.data.tokenizer
    ids = generate(
        model,
        np.array([tokenizer.bos_id, *tokenizer.encode(prompt)], np.int32),
        tokens=tokens,
        temperature=temperature,
        key=key,
        rules=rules,
        dtype=np.dtype(jax.numpy.dtype(config.train.compute_dtype)),
        drawable_V=_drawable(tokenizer),
        end_id=tokenizer.eos_id,
    )
    return tokenizer.decode(ids)


def _drawable(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) bool: ids that stand for text, and the one that ends a document."""
    allowed_V = tokenizer.token_bytes() > 0
    allowed_V[tokenizer.eos_id] = True
    return allowed_V


def sampled_steps(path: Path) -> set[int]:
    """Steps that samples.jsonl has a sample of; those of torn lines are not counted."""
    found = set()
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                found.add(json.loads(line)["step"])
    return found
