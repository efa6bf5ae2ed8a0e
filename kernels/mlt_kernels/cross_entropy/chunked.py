"""A loop over chunks of the sequence; the backward recomputes each chunk's logits from the saved lse.

Four products of B T D V against three for whole logits, and memory for one chunk of them.
Letters: J chunks of C positions; others as in cross_entropy.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *,
    hidden: Array,
    unembedding: Array,
    labels: Array,
    weights: Array,
    z_loss: float,
    softcap: float | None,
    chunk_size: int,
    return_lse: bool,
) -> Any:
    lse_BT, label_logit_BT = _lse_and_label_logit(softcap, chunk_size, hidden, unembedding, labels)
    loss_BT = weights * (lse_BT - label_logit_BT + z_loss * lse_BT**2)
    return (loss_BT, lse_BT) if return_lse else loss_BT


def _forward(softcap: float | None, chunk_size: int, hidden: Array, unembedding: Array, labels: Array) -> tuple[Array, Array]:
    V = unembedding.shape[1]

    def chunk(_: None, xs: tuple[Array, Array]) -> Any:
        hidden_BCD, labels_BC = xs
        logits_BCV = _logits(softcap, hidden_BCD, unembedding)
        top_BC1 = logits_BCV.max(axis=-1, keepdims=True)
        lse_BC = top_BC1[..., 0] + jnp.log(jnp.exp(logits_BCV - top_BC1).sum(axis=-1))
        inside_BC = (labels_BC >= 0) & (labels_BC < V)
        index_BC1 = jnp.where(inside_BC, labels_BC, 0)[..., None]
        label_logit_BC = jnp.take_along_axis(logits_BCV, index_BC1, axis=-1, mode="promise_in_bounds")[..., 0]
        return None, (lse_BC, jnp.where(inside_BC, label_logit_BC, 0))

    _, results = lax.scan(chunk, None, (_cut(hidden, chunk_size), _cut(labels, chunk_size)))
    lse_BT, label_logit_BT = (_join(x, labels.shape[1]) for x in results)
    return lse_BT, label_logit_BT


def _forward_and_residuals(softcap: float | None, chunk_size: int, hidden: Array, unembedding: Array, labels: Array) -> Any:
    lse_BT, label_logit_BT = _forward(softcap, chunk_size, hidden, unembedding, labels)
    return (lse_BT, label_logit_BT), (hidden, unembedding, labels, lse_BT)


def _backward(softcap: float | None, chunk_size: int, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    hidden, unembedding, labels, lse_BT = residuals
    d_lse_BT, d_label_BT = cotangents
    V = unembedding.shape[1]

    def chunk(d_unembedding: Array, xs: tuple[Array, ...]) -> Any:
        hidden_BCD, labels_BC, *per_token = xs
        lse_BC1, d_lse_BC1, d_label_BC1 = (x[..., None] for x in per_token)
        logits_BCV = _logits(softcap, hidden_BCD, unembedding)
        is_label_BCV = labels_BC[..., None] == jnp.arange(V)
        d_logits_BCV = jnp.exp(logits_BCV - lse_BC1) * d_lse_BC1 + jnp.where(is_label_BCV, d_label_BC1, 0)
        if softcap is not None:
            d_logits_BCV = d_logits_BCV * (1 - jnp.square(logits_BCV / softcap))
        d_logits_BCV = d_logits_BCV.astype(hidden.dtype)
        d_hidden_BCD = _dot("bcv,dv->bcd", d_logits_BCV, unembedding)
        d_unembedding = d_unembedding + _dot("bcd,bcv->dv", hidden_BCD, d_logits_BCV)
        return d_unembedding, d_hidden_BCD.astype(hidden.dtype)

    xs = tuple(_cut(x, chunk_size) for x in (hidden, labels, lse_BT, d_lse_BT, d_label_BT))
    zeros = jnp.zeros(unembedding.shape, lse_BT.dtype)
    d_unembedding, d_hidden = lax.scan(chunk, zeros, xs)
    return _join(d_hidden, labels.shape[1]), d_unembedding.astype(unembedding.dtype), None


_lse_and_label_logit = jax.custom_vjp(_forward, nondiff_argnums=(0, 1))
_lse_and_label_logit.defvjp(_forward_and_residuals, _backward)


def _logits(softcap: float | None, hidden_BCD: Array, unembedding: Array) -> Array:
    logits_BCV = _dot("bcd,dv->bcv", hidden_BCD, unembedding)
    return logits_BCV if softcap is None else softcap * jnp.tanh(logits_BCV / softcap)


def _dot(formula: str, a: Array, b: Array) -> Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.result_type(jnp.float32, a))


def _cut(x: Array, chunk_size: int) -> Array:
    """(B, T, ...) to (J, B, C, ...), padded with 0. Chunks are of equal length, so that little of it is padding."""
    B, T = x.shape[:2]
    J = max(1, -(-T // chunk_size))
    C = -(-T // J)
    x = jnp.pad(x, [(0, 0), (0, J * C - T)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(B, J, C, *x.shape[2:]).swapaxes(0, 1)


def _join(x: Array, T: int) -> Array:
    """(J, B, C, ...) to (B, T, ...)."""
    J, B, C = x.shape[:3]
    return x.swapaxes(0, 1).reshape(B, J * C, *x.shape[3:])[:, :T]
