"""Blocks of R rows of one group at a time through all three products, cut from the sorted rows where they stand.

The loops are those of `grouped_matmul`'s `chunked`: over groups, and over as many blocks as a group needs; a block may reach
into rows that are not its group's, which keep what they held. For the backward pass the products with gate and up are kept; all
that is made of them there lasts until a longer block is full, whose rows the weights' gradients sum in one product.

Every product of rows has the same shape whatever the sizes, so a row does not depend on the others, to the bit.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from mlt_kernels.grouped_matmul.chunked import LONG, _block_rows, _blocks, _cut, _mine, _starts

Weights = tuple[Array, Array, Array]


def unsupported(**_: Any) -> str | None:
    return None


def run(*, x: Array, gate: Array, up: Array, down: Array, group_sizes: Array, hidden_name: str | None) -> Array:
    return _experts(hidden_name, x, (gate, up, down), group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(hidden_name: str | None, x: Array, weights: Weights, group_sizes: Array) -> Array:
    return _forward(x, weights, group_sizes, keep=False)[0]


def _fwd(hidden_name: str | None, x: Array, weights: Weights, group_sizes: Array) -> tuple[Array, tuple[Any, ...]]:
    out, *products = _forward(x, weights, group_sizes, keep=True)
    if hidden_name is not None:
        products = [checkpoint_name(product, hidden_name) for product in products]
    return out, (x, weights, group_sizes, *products)


def _forward(x: Array, weights: Weights, group_sizes: Array, *, keep: bool) -> tuple[Array, ...]:
    """The result and, to keep, the products with gate and up, (M, F) each."""
    M, R = x.shape[0], _block_rows(x.shape[0], group_sizes.shape[0])

    def group(outs: tuple[Array, ...], xs: tuple[Array, Array, Weights]) -> tuple[tuple[Array, ...], None]:
        start, size, (gate, up, down) = xs

        def block(i: Array, outs: tuple[Array, ...]) -> tuple[Array, ...]:
            at = jnp.minimum(start + i * R, M - R)
            rows = _cut(x, at, R)
            a, b = (_times(rows, w).astype(x.dtype) for w in (gate, up))
            made = (_times(_hidden(a, b), down), a, b)
            mine_R1 = _mine(at, R, start, size)
            return tuple(_put(out, new, at, mine_R1) for out, new in zip(outs, made, strict=False))

        return lax.fori_loop(0, _blocks(size, R), block, outs), None

    F, N = weights[2].shape[1:]
    nothing = tuple(jnp.zeros((M, width), x.dtype) for width in ((N, F, F) if keep else (N,)))
    return lax.scan(group, nothing, (_starts(group_sizes), group_sizes, weights))[0]


def _bwd(hidden_name: str | None, saved: tuple[Any, ...], d_out: Array) -> tuple[Array, Weights, None]:
    x, weights, group_sizes, *products = saved
    M, R = x.shape[0], _block_rows(x.shape[0], group_sizes.shape[0])
    D, F = weights[0].shape[1:]
    long = max(1, min(M, LONG) // R) * R
    wide = jnp.result_type(jnp.float32, x)

    def group(d_x: Array, xs: tuple[Array, Array, Weights]) -> tuple[Array, Weights]:
        start, size, (gate, up, down) = xs

        def rows(at: Array) -> tuple[Array, Array, Array, Array]:
            """Of the block at `at`: the gradient of its rows; its hidden units and the gradients of what they are made of."""
            a_RF, b_RF = (_cut(product, at, R).astype(wide) for product in products)
            sigmoid_RF = jax.nn.sigmoid(a_RF)
            act_RF = a_RF * sigmoid_RF
            d_hidden_RF = _back(_cut(d_out, at, R), down)
            d_a_RF = (d_hidden_RF * b_RF * (sigmoid_RF + act_RF * (1 - sigmoid_RF))).astype(x.dtype)
            d_b_RF = (d_hidden_RF * act_RF).astype(x.dtype)
            return _back(d_a_RF, gate) + _back(d_b_RF, up), _hidden(*(_cut(p, at, R) for p in products)), d_a_RF, d_b_RF

        def add(total: Weights, x_LD: Array, d_LD: Array, hidden_LF: Array, d_a_LF: Array, d_b_LF: Array) -> Weights:
            pairs = ((x_LD, d_a_LF), (x_LD, d_b_LF), (hidden_LF, d_LD))
            return tuple(t + _over_rows(*pair) for t, pair in zip(total, pairs, strict=True))

        def long_block(i: Array, carry: tuple[Array, Weights]) -> tuple[Array, Weights]:
            first = start + i * long

            def part(j: Array, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
                d_x, kept = carry
                new_RD, *made = rows(first + j * R)
                d_x = lax.dynamic_update_slice_in_dim(d_x, new_RD.astype(x.dtype), first + j * R, 0)
                return d_x, [lax.dynamic_update_slice_in_dim(k, m, j * R, 0) for k, m in zip(kept, made, strict=True)]

            d_x, total = carry
            d_x, kept = lax.fori_loop(0, long // R, part, (d_x, [jnp.zeros((long, F), x.dtype)] * 3))
            return d_x, add(total, _cut(x, first, long), _cut(d_out, first, long), *kept)

        def block(i: Array, carry: tuple[Array, Weights]) -> tuple[Array, Weights]:
            first = start + whole * long + i * R
            at = jnp.minimum(first, M - R)
            mine_R1 = _mine(at, R, first, start + size - first)
            new_RD, *made = rows(at)
            used = [jnp.where(mine_R1, y, 0) for y in (_cut(x, at, R), _cut(d_out, at, R), *made)]
            return _put(carry[0], new_RD, at, mine_R1), add(carry[1], *used)

        whole = size // long
        zeros = (jnp.zeros((D, F), wide), jnp.zeros((D, F), wide), jnp.zeros((F, weights[2].shape[2]), wide))
        carry = lax.fori_loop(0, whole, long_block, (d_x, zeros))
        return lax.fori_loop(0, _blocks(size - whole * long, R), block, carry)

    d_x, totals = lax.scan(group, jnp.zeros_like(x), (_starts(group_sizes), group_sizes, weights))
    return d_x, tuple(t.astype(w.dtype) for t, w in zip(totals, weights, strict=True)), None


_experts.defvjp(_fwd, _bwd)


def _hidden(a: Array, b: Array) -> Array:
    wide = jnp.result_type(jnp.float32, a)
    return (jax.nn.silu(a.astype(wide)) * b.astype(wide)).astype(a.dtype)


def _times(rows: Array, weight: Array) -> Array:
    return jnp.matmul(rows, weight, preferred_element_type=jnp.result_type(jnp.float32, rows))


def _back(rows: Array, weight: Array) -> Array:
    return jnp.einsum("rn,kn->rk", rows, weight, preferred_element_type=jnp.result_type(jnp.float32, rows))


def _over_rows(left: Array, right: Array) -> Array:
    return jnp.einsum("rk,rn->kn", left, right, preferred_element_type=jnp.result_type(jnp.float32, left))


def _put(out: Array, rows: Array, at: Array, mine_R1: Array) -> Array:
    """`out` with those of the rows at `at` that are ours."""
    rows = jnp.where(mine_R1, rows.astype(out.dtype), _cut(out, at, rows.shape[0]))
    return lax.dynamic_update_slice_in_dim(out, rows, at, 0)
