"""KL divergence between the next-token distributions of two models, without the logits of either."""

from typing import Any

import jax
import jax.numpy as jnp

from mlt.parallel.local import STREAM, TOKENS, local
from mlt.parallel.rules import Rules

Head = tuple[jax.Array, jax.Array, float | None]
"""Hidden states (B, T, D), unembedding (D, V) and soft cap of the logits, if any."""

CHUNK = 512


def divergence(rules: Rules, teacher: Head, student: Head, *, temperature: float = 1.0) -> jax.Array:
    """sum over v of p_v (log p_v - log q_v) in nats, (B, T) float32; p and q are the softmax of logits / temperature.

    p is the teacher's, to which no gradient flows. Logits of 512 positions exist at a time, and are made again for the
    gradients. Vocabulary shards meet in the sums of their exponentials and in their parts of the result.

    Args:
        rules: layout; both heads have the same vocabulary (V), widths (D) may differ.
        teacher, student: what the two distributions are made of.
        temperature: positive.
    """

    def log_softmax(hidden_BCD: jax.Array, unembedding_DV: jax.Array, softcap: float | None) -> jax.Array:
        logits_BCV = jnp.einsum("bcd,dv->bcv", hidden_BCD, unembedding_DV, preferred_element_type=jnp.float32)
        logits_BCV = logits_BCV if softcap is None else softcap * jnp.tanh(logits_BCV / softcap)
        logits_BCV = logits_BCV / temperature
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        if rules.size("vocab") > 1:
            lse_BC = jax.nn.logsumexp(jax.lax.all_gather(lse_BC, "tensor"), axis=0)
        return logits_BCV - lse_BC[..., None]

    def run(hidden: jax.Array, unembedding: jax.Array, goal: jax.Array, goal_unembedding: jax.Array) -> jax.Array:
        def chunk(_: None, xs: tuple[jax.Array, jax.Array]) -> Any:
            log_p_BCV = jax.lax.stop_gradient(log_softmax(xs[1], goal_unembedding, teacher[2]))
            log_q_BCV = log_softmax(xs[0], unembedding, student[2])
            part_BC = jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), axis=-1)
            return None, jax.lax.psum(part_BC, "tensor") if rules.size("vocab") > 1 else part_BC

        _, parts = jax.lax.scan(jax.checkpoint(chunk, prevent_cse=False), None, (cut(hidden), cut(goal)))
        return parts.swapaxes(0, 1).reshape(hidden.shape[0], -1)[:, : hidden.shape[1]]

    goals = jax.lax.stop_gradient(teacher[:2])
    inputs = (STREAM, (None, "vocab"), STREAM, (None, "vocab"))
    return local(run, rules, inputs, TOKENS)(student[0], student[1], *goals)


def cut(x_BTD: jax.Array) -> jax.Array:
    """(B, T, D) to (J, B, C, D): J chunks of at most 512 positions, padded with 0."""
    B, T, D = x_BTD.shape
    J = max(1, -(-T // CHUNK))
    C = -(-T // J)
    return jnp.pad(x_BTD, [(0, 0), (0, J * C - T), (0, 0)]).reshape(B, J, C, D).swapaxes(0, 1)
