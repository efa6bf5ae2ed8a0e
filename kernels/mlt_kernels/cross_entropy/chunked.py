"""A loop over chunks of the sequence. Two ways to the gradients, both with memory for one chunk of logits.

Where the loss alone is asked for, its gradients are made with it while each chunk's logits are there: three products of
B T D V in all, as for whole logits. They hold for a cotangent that is the same for every token, which is what a sum or
mean of the losses gives; the hidden states' gradient, token by token, for any. A backward that meets another cotangent,
and every call that also returns lse, recomputes the logits from the saved lse: four products.

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
    if not return_lse:
        return _loss(softcap, chunk_size, z_loss, hidden, unembedding, labels, weights)
    lse_BT, label_logit_BT = _lse_and_label_logit(softcap, chunk_size, hidden, unembedding, labels)
    return _weighed(z_loss, lse_BT, label_logit_BT, weights), lse_BT


def _weighed(z_loss: float, lse_BT: Array, label_logit_BT: Array, weights_BT: Array) -> Array:
    return weights_BT * (lse_BT - label_logit_BT + z_loss * lse_BT**2)


def _forward(softcap: float | None, chunk_size: int, hidden: Array, unembedding: Array, labels: Array) -> tuple[Array, Array]:
    def chunk(_: None, xs: tuple[Array, Array]) -> Any:
        logits_BCV = _logits(softcap, xs[0], unembedding)
        return None, _lse_and_label(logits_BCV, xs[1])

    _, results = lax.scan(chunk, None, (_cut(hidden, chunk_size), _cut(labels, chunk_size)))
    lse_BT, label_logit_BT = (_join(x, labels.shape[1]) for x in results)
    return lse_BT, label_logit_BT


def _forward_and_residuals(softcap: float | None, chunk_size: int, hidden: Array, unembedding: Array, labels: Array) -> Any:
    lse_BT, label_logit_BT = _forward(softcap, chunk_size, hidden, unembedding, labels)
    return (lse_BT, label_logit_BT), (hidden, unembedding, labels, lse_BT)


def _backward(softcap: float | None, chunk_size: int, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    hidden, unembedding, labels, lse_BT = residuals
    d_lse_BT, d_label_BT = cotangents

    def chunk(d_unembedding: Array, xs: tuple[Array, ...]) -> Any:
        hidden_BCD, labels_BC, *per_token = xs
        logits_BCV = _logits(softcap, hidden_BCD, unembedding)
        d_hidden_BCD, d_chunk = _chunk_gradients(softcap, logits_BCV, hidden_BCD, unembedding, labels_BC, *per_token)
        return d_unembedding + d_chunk, d_hidden_BCD.astype(hidden.dtype)

    xs = tuple(_cut(x, chunk_size) for x in (hidden, labels, lse_BT, d_lse_BT, d_label_BT))
    zeros = jnp.zeros(unembedding.shape, lse_BT.dtype)
    d_unembedding, d_hidden = lax.scan(chunk, zeros, xs)
    return _join(d_hidden, labels.shape[1]), d_unembedding.astype(unembedding.dtype), None


_lse_and_label_logit = jax.custom_vjp(_forward, nondiff_argnums=(0, 1))
_lse_and_label_logit.defvjp(_forward_and_residuals, _backward)


def _loss_forward(
    softcap: float | None, chunk_size: int, z_loss: float, hidden: Array, unembedding: Array, labels: Array, weights: Array
) -> Array:
    lse_BT, label_logit_BT = _forward(softcap, chunk_size, hidden, unembedding, labels)
    return _weighed(z_loss, lse_BT, label_logit_BT, weights)


def _loss_and_gradients(
    softcap: float | None, chunk_size: int, z_loss: float, hidden: Array, unembedding: Array, labels: Array, weights: Array
) -> Any:
    def chunk(d_unembedding: Array, xs: tuple[Array, ...]) -> Any:
        hidden_BCD, labels_BC, weights_BC = xs
        logits_BCV = _logits(softcap, hidden_BCD, unembedding)
        lse_BC, label_logit_BC = _lse_and_label(logits_BCV, labels_BC)
        d_lse_BC = weights_BC * (1 + 2 * z_loss * lse_BC)
        d_hidden_BCD, d_chunk = _chunk_gradients(
            softcap, logits_BCV, hidden_BCD, unembedding, labels_BC, lse_BC, d_lse_BC, -weights_BC
        )
        return d_unembedding + d_chunk, (lse_BC, label_logit_BC, d_hidden_BCD)

    zeros = jnp.zeros(unembedding.shape, weights.dtype)
    d_unembedding, results = lax.scan(chunk, zeros, tuple(_cut(x, chunk_size) for x in (hidden, labels, weights)))
    lse_BT, label_logit_BT, d_hidden = (_join(x, labels.shape[1]) for x in results)
    saved = (hidden, unembedding, labels, weights, lse_BT, label_logit_BT, d_hidden, d_unembedding)
    return _weighed(z_loss, lse_BT, label_logit_BT, weights), saved


def _loss_backward(softcap: float | None, chunk_size: int, z_loss: float, saved: Any, cotangent_BT: Array) -> Any:
    hidden, unembedding, labels, weights, lse_BT, label_logit_BT, d_hidden, d_unembedding = saved
    one = cotangent_BT[0, 0] if cotangent_BT.size else jnp.ones((), cotangent_BT.dtype)

    def scaled() -> Array:
        return (one * d_unembedding).astype(unembedding.dtype)

    def again() -> Array:
        d_lse_BT = cotangent_BT * weights * (1 + 2 * z_loss * lse_BT)
        residuals = (hidden, unembedding, labels, lse_BT)
        return _backward(softcap, chunk_size, residuals, (d_lse_BT, -cotangent_BT * weights))[1]

    d_weights_BT = cotangent_BT * _weighed(z_loss, lse_BT, label_logit_BT, jnp.ones_like(weights))
    d_hidden = (cotangent_BT[..., None] * d_hidden).astype(hidden.dtype)
    return d_hidden, lax.cond(jnp.all(cotangent_BT == one), scaled, again), None, d_weights_BT


_loss = jax.custom_vjp(_loss_forward, nondiff_argnums=(0, 1, 2))
_loss.defvjp(_loss_and_gradients, _loss_backward)


def _lse_and_label(logits_BCV: Array, labels_BC: Array) -> tuple[Array, Array]:
    top_BC1 = logits_BCV.max(axis=-1, keepdims=True)
    lse_BC = top_BC1[..., 0] + jnp.log(jnp.exp(logits_BCV - top_BC1).sum(axis=-1))
    inside_BC = (labels_BC >= 0) & (labels_BC < logits_BCV.shape[-1])
    index_BC1 = jnp.where(inside_BC, labels_BC, 0)[..., None]
    label_logit_BC = jnp.take_along_axis(logits_BCV, index_BC1, axis=-1, mode="promise_in_bounds")[..., 0]
    return lse_BC, jnp.where(inside_BC, label_logit_BC, 0)


def _chunk_gradients(
    softcap: float | None,
    logits_BCV: Array,
    hidden_BCD: Array,
    unembedding: Array,
    labels_BC: Array,
    lse_BC: Array,
    d_lse_BC: Array,
    d_label_BC: Array,
) -> tuple[Array, Array]:
    """Gradients of a chunk's hidden states (wide) and its part of the unembedding's."""
    lse_BC1, d_lse_BC1, d_label_BC1 = (x[..., None] for x in (lse_BC, d_lse_BC, d_label_BC))
    is_label_BCV = labels_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
    d_logits_BCV = jnp.exp(logits_BCV - lse_BC1) * d_lse_BC1 + jnp.where(is_label_BCV, d_label_BC1, 0)
    if softcap is not None:
        d_logits_BCV = d_logits_BCV * (1 - jnp.square(logits_BCV / softcap))
    d_logits_BCV = d_logits_BCV.astype(hidden_BCD.dtype)
    return _dot("bcv,dv->bcd", d_logits_BCV, unembedding), _dot("bcd,bcv->dv", hidden_BCD, d_logits_BCV)


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
