"""Inputs with what stands in front of them, and which document each belongs to."""

import jax.numpy as jnp
from jax import Array


def extend(x_BTD: Array, segment_ids_BT: Array | None, halo_BLD: Array | None, context: int) -> tuple[Array, Array]:
    """(inputs (B, L + T, D), run number of each (B, L + T)) with L = context tokens in front.

    Runs are numbered, not named by their segment id: a row may use an id twice. The halo is of the first run.
    """
    B, T, D = x_BTD.shape
    front_BLD = jnp.zeros((B, context, D), x_BTD.dtype) if halo_BLD is None else halo_BLD.astype(x_BTD.dtype)
    run_BT = jnp.zeros((B, T), jnp.int32)
    if segment_ids_BT is not None:
        changed = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
        run_BT = run_BT.at[:, 1:].set(jnp.cumsum(changed, axis=1, dtype=jnp.int32))
    front_BL = jnp.zeros((B, context), jnp.int32)
    return jnp.concatenate([front_BLD, x_BTD], axis=1), jnp.concatenate([front_BL, run_BT], axis=1)


def following(inputs: Array, run: Array, context: int) -> Array:
    """The halo for the row behind: the last `context` inputs, zero where not of the last token's run."""
    length = inputs.shape[1]
    last, last_run = inputs[:, length - context :], run[:, length - context :]
    return jnp.where((last_run == run[:, -1:])[..., None], last, jnp.zeros((), inputs.dtype))
