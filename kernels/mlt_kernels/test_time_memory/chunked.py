"""Piece by piece: products of tokens with tokens stand for the weights that each token reads, which never exist.

With the gradients of a chunk all taken at W_0, a gradient of matrix l is u_l (x) delta_l: what enters the matrix and the
derivative at what leaves it. So the weights that token t reads are, for some scalars of the gates,

    beta_t A + f_t S + sum_{j<=t} G_tj u_j (x) d_j,     d_j = -theta_j delta_j

and applying them to ubar_t costs two products with A and S and two of tokens with tokens. The body is rematerialised; only the
state that enters each piece is kept for the backward pass.

Letters: B rows, H heads, J pieces, C slots of a piece (i after j), a and b the sides of a matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels.test_time_memory import _network as network
from mlt_kernels.test_time_memory._pieces import Grid, Pieces, grid, pieces
from mlt_kernels.test_time_memory._products import HIGHEST, Product, product_for
from mlt_kernels.test_time_memory._spec import MemorySpec, MemoryState, started

Matrices = tuple[Array, ...]


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *,
    q: Array,
    k: Array,
    v: Array,
    memory: Matrices,
    spec: MemorySpec,
    step: Array,
    log_decay: Array | None,
    log_momentum: Array | None,
    threshold: Array | None,
    row_weight: Array | None,
    norm: tuple[Array, Array] | None,
    initial_state: MemoryState | None,
    segment_ids: Array | None,
    return_final_state: bool,
) -> Any:
    B, T = q.shape[:2]
    wide = memory[0].dtype
    low = jnp.result_type(q, k, v)
    gated = log_momentum is not None
    stateful = initial_state is not None or return_final_state
    cut: Grid | Pieces
    if segment_ids is None and not stateful:
        cut = grid(B, T, spec)
    else:
        position = None if initial_state is None else initial_state.position
        cut = pieces(segment_ids, position, B, T, spec)

    # Moved to their pieces as two arrays: the operands, and everything of the wide dtype.
    xs: dict[str, Array] = {"tokens": _heads(cut.take(jnp.concatenate([x.astype(low) for x in (q, k, v)], axis=-1)))}
    gates = {"log_decay": log_decay, "log_momentum": log_momentum, "threshold": threshold}
    present = {name: gate for name, gate in gates.items() if gate is not None}
    wide_inputs = jnp.concatenate([step, *(gate[..., None] for gate in present.values())], axis=-1)
    xs |= {"gates": _heads(cut.take(wide_inputs)), "real": cut.real_JBC, "place": cut.place_JBC, "fresh": cut.fresh_JB}
    if isinstance(cut, Pieces):
        xs["document"] = cut.document_JBC

    dot = product_for(low, wide)
    scale_and_bias = None if norm is None else (norm[0][:, None], norm[1][:, None])
    body = _Body(spec, memory, row_weight, scale_and_bias, q.shape[-1], tuple(present), wide, dot)
    start = started(tuple(jnp.broadcast_to(w, (B, *w.shape)) for w in memory), spec, gated)._replace(position=None)
    if initial_state is not None:
        start = jax.tree.map(lambda x, like: x.astype(like.dtype), initial_state._replace(position=None), start)
    carry = start if stateful else body.between_chunks(start)

    def one(carry: MemoryState, x: dict[str, Array]) -> tuple[MemoryState, Array]:
        if isinstance(cut, Grid):
            return body(carry, x)
        nothing = jnp.zeros((*x["tokens"].shape[:3], v.shape[-1]), low)
        return jax.lax.cond(jnp.any(x["real"]), body, lambda carry, _: (carry, nothing), carry, x)

    carry, o_JBHCV = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), carry, xs)
    o = cut.put_back(jnp.moveaxis(o_JBHCV, 2, 3)).astype(v.dtype)
    if segment_ids is not None:
        o = jnp.where((segment_ids != 0)[..., None, None], o, 0)
    if not return_final_state:
        return o
    assert isinstance(cut, Pieces)
    return o, carry._replace(position=cut.position_B)


class Coefficients(NamedTuple):
    """Of the weights that slot i reads, and of those that leave after the last real slot.

    None is a factor of 1 for the carried weights; for the rest, something the rule does not have.
    """

    beta_C: Array | None
    f_C: Array | None
    G_CC: Any
    beta_last: Array | None
    f_last: Array | None
    G_last: Array
    m_last: Array | None
    N_last: Array


class _Body:
    """One piece: (carried state, its tokens) -> (state that leaves, outputs)."""

    def __init__(
        self,
        spec: MemorySpec,
        memory: Matrices,
        row_weight: Any,
        norm: tuple[Array, Array] | None,
        key_dim: int,
        gates: tuple[str, ...],
        wide: Any,
        dot: Product,
    ):
        self.spec, self.memory, self.row_weight, self.norm = spec, memory, row_weight, norm
        self.key_dim, self.gates, self.wide, self.dot = key_dim, gates, wide, dot
        self.gated = "log_momentum" in gates

    def between_chunks(self, state: MemoryState) -> MemoryState:
        """What of a state is not known anyway where every piece begins a chunk."""
        steps = state.steps if self.spec.rule == "momentum" else ()
        return state._replace(anchor=(), steps=steps, gate_sum=None)

    def __call__(self, carry: MemoryState, x: dict[str, Array]) -> tuple[MemoryState, Array]:
        spec, dot = self.spec, self.dot
        x = self._named(x)
        full = self._filled(carry)
        B = x["fresh"].shape[0]
        start = started(tuple(jnp.broadcast_to(w, (B, *w.shape)) for w in self.memory), spec, self.gated)
        state = jax.tree.map(lambda new, old: _where(x["fresh"], new, old), start._replace(position=None), full)
        anchor = state.anchor if spec.running else state.weights
        exposed = tuple(network.expose(spec, a) for a in anchor)
        inputs, signals = self._factors(exposed, x)
        writes = tuple(-x["step"][..., level, None] * d for level, d in enumerate(signals))
        c = self._coefficients(x)
        if spec.read == "chunk":
            maps = [lambda u, w=w: dot(u, w) for w in exposed]
        else:
            scales = [network.link_scale(spec, a) for a in anchor]
            maps = [self._reader(c, state, scales, inputs, writes, level) for level in range(len(self.memory))]
        o = network.forward(spec, maps, x["q"].astype(self.wide), self.norm).astype(x["v"].dtype)
        leaving = self._roll(state, c, inputs, writes, x)
        if "document" in x:
            some_B = jnp.any(x["real"], axis=1)
            leaving = jax.tree.map(lambda new, old: _where(some_B, new, old), leaving, full)
        kept = self.between_chunks(leaving) if jax.tree.structure(leaving) != jax.tree.structure(carry) else leaving
        return kept, o

    def _named(self, x: dict[str, Array]) -> dict[str, Array]:
        """The piece's inputs by name, and which slot is its last real one."""
        K, L = self.key_dim, len(self.memory)
        tokens, gates = x["tokens"], x["gates"]
        named = {"q": tokens[..., :K], "k": tokens[..., K : 2 * K], "v": tokens[..., 2 * K :], "step": gates[..., :L]}
        named |= {name: gates[..., L + n] for n, name in enumerate(self.gates)}
        slot = jnp.arange(x["real"].shape[1])
        last = jnp.max(jnp.where(x["real"], slot, 0), axis=1, keepdims=True)
        return {**x, **named, "last": slot == last}

    def _filled(self, carry: MemoryState) -> MemoryState:
        """The whole state, at the start of a chunk where the carry leaves parts out."""
        like = started(carry.weights, self.spec, self.gated)
        gate_sum = like.gate_sum if carry.gate_sum is None else carry.gate_sum
        return MemoryState(carry.weights, carry.steps or like.steps, carry.anchor or like.anchor, carry.previous, gate_sum, None)

    def _factors(self, exposed: Matrices, x: dict[str, Array]) -> tuple[list[Array], list[Array]]:
        """Each matrix's inputs (B, H, C, a), and the derivatives of the losses by its outputs (B, H, C, b)."""
        threshold = x.get("threshold")
        k, v = x["k"].astype(self.wide), x["v"].astype(self.wide)

        def objective(shifts: list[Array]) -> tuple[Array, list[Array]]:
            seen: dict[int, Array] = {}

            def apply(level: int, u: Array) -> Array:
                seen[level] = u
                return self.dot(u, exposed[level]) + shifts[level]

            maps = [lambda u, level=level: apply(level, u) for level in range(len(exposed))]
            y = network.forward(self.spec, maps, k, self.norm)
            return jnp.sum(network.loss(self.spec, y, v, threshold)), [seen[level] for level in range(len(exposed))]

        shifts = [jnp.zeros((*k.shape[:3], w.shape[-1]), self.wide) for w in exposed]
        signals, inputs = jax.grad(objective, has_aux=True)(shifts)
        return inputs, signals

    def _coefficients(self, x: dict[str, Array]) -> Coefficients:
        spec = self.spec
        C = x["place"].shape[1]
        slot = jnp.arange(C)
        last_B1C = x["last"][:, None]
        same_BCC = (slot[:, None] >= slot)[None]
        if "document" in x:
            same_BCC = same_BCC & (x["document"][:, :, None] == x["document"][:, None, :])
        same_BHCC = jnp.broadcast_to(same_BCC, (*x["last"].shape, C))[:, None]

        def at_last(values: Array) -> Array:
            return jnp.sum(jnp.where(last_B1C, values, 0), axis=-1)

        def row(matrix: Array) -> Array:
            return jnp.sum(jnp.where(last_B1C[..., None], matrix, 0), axis=-2)

        one_last = row(same_BHCC.astype(self.wide))
        if spec.rule == "mean":
            tau_BHC = self.row_weight[x["place"]][:, None]
            return Coefficients(None, tau_BHC, jnp.where(same_BHCC, tau_BHC[..., None], 0), None, None, one_last, None, one_last)
        if spec.rule == "chunk":
            return Coefficients(None, None, None, None, None, one_last, None, one_last)
        beta, D = _decays(x.get("log_decay"), same_BHCC, self.wide)
        beta_last = None if beta is None else at_last(beta)
        if spec.rule == "descent":
            return Coefficients(beta, None, D, beta_last, None, row(D), None, one_last)
        m, N = _decays(x["log_momentum"], same_BHCC, self.wide)
        f = jnp.matmul(D, m[..., None], precision=HIGHEST)[..., 0]
        G = jnp.matmul(D, N, precision=HIGHEST)
        return Coefficients(beta, f, G, beta_last, at_last(f), row(G), at_last(m), row(N))

    def _reader(
        self, c: Coefficients, state: MemoryState, scales: list[Any], inputs: list[Array], writes: Matrices, level: int
    ) -> Callable[[Array], Array]:
        """The map of one matrix, for tokens that each read weights of their own."""

        def apply(u: Array) -> Array:
            z = _rows(c.beta_C, self.dot(u, state.weights[level]))
            if c.f_C is not None:
                z = z + _rows(c.f_C, self.dot(u, state.steps[level]))
            overlaps = self.dot(u, jnp.swapaxes(inputs[level], -2, -1))
            z = z + self.dot(c.G_CC * overlaps, writes[level])
            return z if scales[level] is None else scales[level] * z

        return apply

    def _roll(
        self, state: MemoryState, c: Coefficients, inputs: list[Array], writes: Matrices, x: dict[str, Array]
    ) -> MemoryState:
        spec = self.spec
        ends = jnp.any(x["last"] & (x["place"] == spec.chunk_size - 1), axis=1)

        def written(level: int, weight_BHC: Array) -> Array:
            return self.dot(jnp.swapaxes(inputs[level] * weight_BHC[..., None], -2, -1), writes[level])

        levels = range(len(writes))
        if spec.running:
            weights = [_whole(c.beta_last, a) + written(n, c.G_last) for n, a in enumerate(state.weights)]
            if spec.rule == "momentum":
                weights = [w + _whole(c.f_last, s) for w, s in zip(weights, state.steps, strict=True)]
                steps = tuple(_whole(c.m_last, s) + written(n, c.N_last) for n, s in enumerate(state.steps))
                state = state._replace(steps=steps)
            anchor = tuple(_where(ends, w, a) for w, a in zip(weights, state.anchor, strict=True))
            return state._replace(weights=tuple(weights), anchor=anchor)

        steps = tuple(s + written(n, c.N_last) for n, s in enumerate(state.steps))
        nothing = tuple(jnp.where(ends[:, None, None, None], 0, s) for s in steps)
        if spec.rule == "mean":
            moved = [w + self.row_weight[-1] * s for w, s in zip(state.weights, steps, strict=True)]
            state = state._replace(steps=nothing)
        else:
            step = steps
            if state.gate_sum is not None:
                total = state.gate_sum + jnp.sum(c.N_last * jnp.exp(x["log_momentum"]), axis=-1)
                mean = total / spec.chunk_size
                step = tuple(s + _whole(mean, p) for s, p in zip(steps, state.previous, strict=True))
                previous = tuple(_where(ends, s, p) for s, p in zip(step, state.previous, strict=True))
                state = state._replace(previous=previous, gate_sum=_where(ends, jnp.zeros_like(total), total))
            moved = [state.weights[n] + network.orthogonalize(spec, step[n], self.dot) for n in levels]
            moved = [network.renormalize(spec, w, initial) for w, initial in zip(moved, self.memory, strict=True)]
            state = state._replace(steps=nothing)
        return state._replace(weights=tuple(_where(ends, m, w) for m, w in zip(moved, state.weights, strict=True)))


def _heads(x_JBCH: Array) -> Array:
    return jnp.moveaxis(x_JBCH, 3, 2)


def _decays(log_BHC: Array | None, same_BHCC: Array, dtype: Any) -> tuple[Any, Array]:
    """What is left at slot i of what was carried in, (B, H, C), and of what was written at slot j, (B, H, C, C).

    Every sum of logs begins anew at the slot that it starts from: nothing cancels, and nothing crosses a document.
    """
    if log_BHC is None:
        return None, same_BHCC.astype(dtype)
    terms = jnp.where(same_BHCC, log_BHC[..., None, :], 0)
    carried = jnp.exp(jnp.sum(terms, axis=-1))
    C = log_BHC.shape[-1]
    after = jnp.where(same_BHCC & ~jnp.eye(C, dtype=bool), log_BHC[..., :, None], 0)
    return carried, jnp.where(same_BHCC, jnp.exp(jnp.cumsum(after, axis=-2)), 0)


def _rows(factor: Array | None, x: Array) -> Array:
    return x if factor is None else factor[..., None] * x


def _whole(factor: Array | None, x: Array) -> Array:
    return x if factor is None else factor[..., None, None] * x


def _where(mask_B: Array, a: Array, b: Array) -> Array:
    return jnp.where(mask_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)
