"""Decoding from states gives what the full pass gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mlt.loss import Batch
from mlt.model.lm import LM
from mlt.verify.model import DTYPE, Subject
from mlt.verify.result import Result, largest_difference

TOLERANCE = 1e-4


def decode(subject: Subject, seed: int) -> Result:
    """Prefill part of packed rows, then go on token by token; compare all logits with the full pass."""
    batch = subject.rows(seed)
    full = np.asarray(subject.logits(batch))
    prefix = subject.length // 3
    stepped = np.asarray(_stepwise(subject, prefix)(subject.model, batch))
    real = batch["segment_ids"] > 0
    worst = largest_difference(full[real], stepped[real])
    counts = f"prefill of {prefix} tokens, then {subject.length - prefix} steps"
    bound, words = subject.bound(batch, worst, TOLERANCE)
    return Result("decode", worst <= bound, f"{counts}: relative difference {worst:.1e} ({words})")


def _stepwise(subject: Subject, prefix: int):
    @jax.jit
    def run(model: LM, batch: Batch) -> jax.Array:
        rows, length = batch["tokens"].shape
        step = functools.partial(model.step, dtype=DTYPE)
        state = model.init_state(rows, length, DTYPE)
        head = {name: value[:, :prefix] for name, value in batch.items()}
        first, state = step(state, subject.context(head))

        def body(state, column):
            one = {name: value[:, None] for name, value in column.items()}
            hidden, state = step(state, subject.context(one))
            return state, hidden[:, 0]

        columns = {name: jnp.moveaxis(jnp.asarray(value[:, prefix:]), 1, 0) for name, value in batch.items()}
        _, rest = jax.lax.scan(body, state, columns)
        return model.logits(jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1))

    return run
