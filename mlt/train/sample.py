"""Samples of a run: text drawn by its model in training, and by `mlt generate` afterwards."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np

from mlt.config.run import RunConfig
from mlt.data.clusters import ClusterTree
from mlt.data.tokenize import Tokenizer
from mlt.model.generate import generate
from mlt.model.lm import LM
from mlt.parallel.rules import Rules
from mlt.train.clusters import cluster_of


def draw_text(
    config: RunConfig,
    model: LM,
    rules: Rules,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    key: jax.Array,
    tree: ClusterTree | None = None,
    cluster: int | None = None,
    memory: LM | None = None,
    share: float = 0.0,
) -> str:
    """What the model says after a prompt that starts a document; the prompt is not repeated.

    Args:
        tree: the run's clusters, for models that read them: the prompt has the cluster of its own words.
        cluster: leaf of the prompt in place of that.
        memory, share: as for `generate`.
    """
    tokenizer = config.data.tokenizer
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(prompt)], np.int32)
    drawn = generate(
        model,
        ids,
        tokens=tokens,
        temperature=temperature,
        key=key,
        rules=rules,
        dtype=np.dtype(jax.numpy.dtype(config.train.compute_dtype)),
        drawable_V=_drawable(tokenizer),
        end_id=tokenizer.eos_id,
        cluster=cluster_of(tree, ids) if cluster is None else cluster,
        memory=memory,
        share=share,
    )
    return tokenizer.decode(drawn)


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
