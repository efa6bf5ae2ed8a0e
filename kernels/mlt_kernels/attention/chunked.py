"""Blocks of queries against blocks of keys with a running softmax; the backward recomputes the scores from lse.

A loop over query blocks holds a loop over the key blocks that some query of the block can see: causal halves the
work, a window or packed documents cut it further, and no score lives longer than one block. Visiting a hidden
block changes no bit: its probabilities are exact zeros and the running maximum stays.

Letters: I query blocks of C queries, J key blocks of L keys, G query heads of a key head; others as in attention.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from mlt_kernels.attention import EMPTY_LSE, Pair
from mlt_kernels.attention._tiles import Marks, Tiling, marks, pad_tokens, tiling


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *,
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    window: int | None,
    segment_ids: tuple[Array, Array] | None,
    positions: Pair | None,
    sinks: Array | None,
    softcap: float | None,
    scale: float,
    bias: Array | None,
    return_lse: bool,
) -> Any:
    tile = tiling(q, k, causal=causal, window=window, softcap=softcap, scale=scale)
    out, lse = _attention(tile, q, k, v, sinks, bias, marks(tile, segment_ids, positions))
    return (out, lse) if return_lse else out


def _forward(tile: Tiling, q: Array, k: Array, v: Array, sinks: Any, bias: Any, seen: Marks) -> tuple[Array, Array]:
    B, T, N, _ = q.shape
    K, P = v.shape[2:]
    G, C = N // K, tile.C
    wide = jnp.result_type(jnp.float32, q)
    keys, values = _KeyBlocks(tile, k), _KeyBlocks(tile, v)
    biases = _Bias(tile, bias, K)

    def query_block(_: None, xs: Any) -> Any:
        i, first, end, q_BKGCH = xs

        def key_block(j: Array, carry: Any) -> Any:
            o_BKGCP, top_BKGC1, sum_BKGC1 = carry
            x_BKGCL, _ = _scores(tile, q_BKGCH, keys.take(j), biases.take(i, j), tile.visible(seen, i, j), wide)
            new_top = jnp.maximum(top_BKGC1, x_BKGCL.max(axis=-1, keepdims=True))
            p_BKGCL, keep = _exp(x_BKGCL, new_top), _exp(top_BKGC1, new_top)
            new_o = o_BKGCP * keep + _dot("bkgcl,bklp->bkgcp", p_BKGCL.astype(v.dtype), values.take(j), wide)
            return new_o, new_top, sum_BKGC1 * keep + p_BKGCL.sum(axis=-1, keepdims=True)

        empty = (
            jnp.zeros((B, K, G, C, P), wide),
            jnp.full((B, K, G, C, 1), -jnp.inf, wide),
            jnp.zeros((B, K, G, C, 1), wide),
        )
        o, top, total = _loop(tile.J, first, end, key_block, empty)
        if sinks is not None:
            sink = sinks.astype(wide).reshape(1, K, G, 1, 1)
            new_top = jnp.maximum(top, sink)
            keep = _exp(top, new_top)
            o, top, total = o * keep, new_top, total * keep + _exp(sink, new_top)
        seen_any = total > 0
        total = jnp.where(seen_any, total, 1)
        lse = jnp.where(seen_any, top + jnp.log(total), EMPTY_LSE)
        return None, ((o / total).astype(q.dtype), lse)

    xs = (jnp.arange(tile.I, dtype=jnp.int32), *tile.key_blocks(seen), _query_blocks(tile, q, K))
    _, (o_IBKGCP, lse_IBKGC1) = lax.scan(query_block, None, xs)
    return _rows(o_IBKGCP, T), _rows(lse_IBKGC1, T)[..., 0]


def _backward(tile: Tiling, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    q, k, v, sinks, bias, seen, out, lse = residuals
    d_out, d_lse = cotangents
    B, T = q.shape[:2]
    K = v.shape[2]
    wide = jnp.result_type(jnp.float32, q)
    # A score's gradient is p (do . v - delta): the output's and the log-sum-exp's share in one number a query.
    delta_BTN = jnp.einsum("btnp,btnp->btn", d_out.astype(wide), out.astype(wide)) - d_lse
    keys, values = _KeyBlocks(tile, k), _KeyBlocks(tile, v)
    biases = _Bias(tile, bias, K)

    def query_block(carry: Any, xs: Any) -> Any:
        i, first, end, q_BKGCH, do_BKGCP, lse_BKGC1, delta_BKGC1 = xs

        def key_block(j: Array, carry: Any) -> Any:
            dq_BKGCH, dk, dv, db = carry
            k_BKLH, v_BKLP = keys.take(j), values.take(j)
            x_BKGCL, capped = _scores(tile, q_BKGCH, k_BKLH, biases.take(i, j), tile.visible(seen, i, j), wide)
            p_BKGCL = jnp.exp(x_BKGCL - lse_BKGC1)
            dx_BKGCL = p_BKGCL * (_dot("bkgcp,bklp->bkgcl", do_BKGCP, v_BKLP, wide) - delta_BKGC1)
            db = biases.add(db, dx_BKGCL, i, j)
            if tile.softcap is not None:
                dx_BKGCL = dx_BKGCL * (1 - jnp.square(capped / tile.softcap))
            dx_BKGCL = (dx_BKGCL * tile.scale).astype(q.dtype)
            dq_BKGCH = dq_BKGCH + _dot("bkgcl,bklh->bkgch", dx_BKGCL, k_BKLH, wide)
            dk = _add_at(dk, _dot("bkgcl,bkgch->bklh", dx_BKGCL, q_BKGCH, wide), j)
            dv = _add_at(dv, _dot("bkgcl,bkgcp->bklp", p_BKGCL.astype(q.dtype), do_BKGCP, wide), j)
            return dq_BKGCH, dk, dv, db

        dq = jnp.zeros(q_BKGCH.shape, wide)
        dq, *carry = _loop(tile.J, first, end, key_block, (dq, *carry))
        return tuple(carry), dq.astype(q.dtype)

    # Rows that fill up the last block get p = 0, whatever a broadcast bias adds to their scores.
    padded_lse = pad_tokens(lse[..., None], tile.I * tile.C, constant_values=jnp.inf)
    rows = (q, d_out.astype(q.dtype), padded_lse, delta_BTN[..., None])
    xs = (jnp.arange(tile.I, dtype=jnp.int32), *tile.key_blocks(seen), *(_query_blocks(tile, x, K) for x in rows))
    zeros = [jnp.zeros((tile.J, B, K, tile.L, x.shape[-1]), wide) for x in (k, v)]
    (dk, dv, db), dq_IBKGCH = lax.scan(query_block, (*zeros, biases.zeros(wide)), xs)
    d_sinks = None
    if sinks is not None:
        # The sink's value is 0: its score's gradient is -p delta.
        p_BTN = jnp.exp(sinks.astype(wide) - lse)
        d_sinks = -(p_BTN * delta_BTN).sum(axis=(0, 1)).astype(sinks.dtype)
    dk, dv = (_unblock_keys(x, tile.keys, k.dtype) for x in (dk, dv))
    return _rows(dq_IBKGCH, T), dk, dv, d_sinks, biases.finish(db), None


def _forward_and_residuals(tile: Tiling, q: Array, k: Array, v: Array, sinks: Any, bias: Any, seen: Marks) -> Any:
    out, lse = _forward(tile, q, k, v, sinks, bias, seen)
    return (out, lse), (q, k, v, sinks, bias, seen, out, lse)


_attention = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_attention.defvjp(_forward_and_residuals, _backward)


def _scores(tile: Tiling, q: Array, k: Array, bias: Any, visible: Any, wide: Any) -> tuple[Array, Array]:
    """Scores (B, K, G, C, L) with -inf where hidden, and their capped part before bias and mask."""
    x = tile.scale * _dot("bkgch,bklh->bkgcl", q, k, wide)
    if tile.softcap is not None:
        x = tile.softcap * jnp.tanh(x / tile.softcap)
    capped = x
    if bias is not None:
        x = x + bias.astype(wide)
    if visible is not None:
        x = jnp.where(visible, x, -jnp.inf)
    return x, capped


def _exp(x: Array, top: Array) -> Array:
    """exp(x - top), 0 where both are -inf."""
    return jnp.exp(x - jnp.where(top == -jnp.inf, 0, top))


def _dot(formula: str, a: Array, b: Array, wide: Any) -> Array:
    return jnp.einsum(formula, a, b, preferred_element_type=wide)


def _loop(blocks: int, first: Array, end: Array, body: Callable[[Array, Any], Any], init: Any) -> Any:
    """`body` for blocks first, ..., end - 1; a single block is always visited."""
    return body(jnp.int32(0), init) if blocks == 1 else lax.fori_loop(first, end, body, init)


def _add_at(total: Array, update: Array, index: Array) -> Array:
    old = lax.dynamic_index_in_dim(total, index, 0, keepdims=False)
    return lax.dynamic_update_index_in_dim(total, old + update, index, 0)


def _query_blocks(tile: Tiling, x: Array, K: int) -> Array:
    """(B, T, N, H) to (I, B, K, G, C, H)."""
    B, _, N, H = x.shape
    x = pad_tokens(x, tile.I * tile.C).reshape(B, tile.I, tile.C, K, N // K, H)
    return x.transpose(1, 0, 3, 4, 2, 5)


def _rows(x_IBKGCP: Array, T: int) -> Array:
    """(I, B, K, G, C, P) to (B, T, N, P)."""
    I, B, K, G, C, P = x_IBKGCP.shape  # noqa: E741
    return x_IBKGCP.transpose(1, 0, 4, 2, 3, 5).reshape(B, I * C, K * G, P)[:, :T]


def _unblock_keys(x_JBKLH: Array, S: int, dtype: Any) -> Array:
    """(J, B, K, L, H) to (B, S, K, H)."""
    J, B, K, L, H = x_JBKLH.shape
    return x_JBKLH.transpose(1, 0, 3, 2, 4).reshape(B, J * L, K, H)[:, :S].astype(dtype)


class _KeyBlocks:
    """Key blocks (B, K, L, H) of (B, S, K, H): laid out once if many query blocks read them, else cut as needed."""

    def __init__(self, tile: Tiling, x: Array):
        B, _, K, H = x.shape
        self.once = tile.I == 1
        self.blocks = pad_tokens(x, tile.J * tile.L).reshape(B, tile.J, tile.L, K, H)
        if not self.once:
            self.blocks = self.blocks.transpose(1, 0, 3, 2, 4)

    def take(self, j: Array) -> Array:
        if self.once:
            return lax.dynamic_index_in_dim(self.blocks, j, 1, keepdims=False).swapaxes(1, 2)
        return lax.dynamic_index_in_dim(self.blocks, j, 0, keepdims=False)


class _Bias:
    """Blocks of a bias whose dims may be 1, and the sum of their gradients. All of it None without a bias."""

    def __init__(self, tile: Tiling, bias: Array | None, K: int):
        self.given = bias
        if bias is None:
            return
        b, n, t, s = bias.shape
        self.steps = (0 if t == 1 else tile.C, 0 if s == 1 else tile.L)
        self.sizes = (self.steps[0] or 1, self.steps[1] or 1)
        pads = (tile.I * self.steps[0] - t, tile.J * self.steps[1] - s)
        padded = jnp.pad(bias, ((0, 0), (0, 0), *((0, max(0, pad)) for pad in pads)))
        heads = (1, 1) if n == 1 else (K, n // K)
        self.padded = padded.reshape(b, *heads, *padded.shape[2:])

    def take(self, i: Array, j: Array) -> Array | None:
        return None if self.given is None else self._cut(self.padded, i, j)

    def zeros(self, wide: Any) -> Array | None:
        return None if self.given is None else jnp.zeros(self.padded.shape, wide)

    def add(self, total: Array | None, dx: Array, i: Array, j: Array) -> Array | None:
        if total is None:
            return None
        old = self._cut(total, i, j)
        summed = tuple(d for d in range(dx.ndim) if old.shape[d] == 1)
        new = old + dx.sum(axis=summed, keepdims=True)
        return lax.dynamic_update_slice(total, new, self._start(i, j))

    def finish(self, total: Array | None) -> Array | None:
        if total is None or self.given is None:
            return None
        b, n, t, s = self.given.shape
        return total[..., :t, :s].reshape(b, n, t, s).astype(self.given.dtype)

    def _cut(self, x: Array, i: Array, j: Array) -> Array:
        return lax.dynamic_slice(x, self._start(i, j), (*x.shape[:3], *self.sizes))

    def _start(self, i: Array, j: Array) -> tuple[Array, ...]:
        zero = jnp.zeros_like(i)
        return zero, zero, zero, i * self.steps[0], j * self.steps[1]
