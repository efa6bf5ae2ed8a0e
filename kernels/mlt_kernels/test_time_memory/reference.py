"""The token loop: automatic gradients of the network at the chunk's first weights, every rule as it is written.

Float64 inputs are computed in float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels import segments
from mlt_kernels.test_time_memory import _network as network
from mlt_kernels.test_time_memory._spec import MemorySpec, MemoryState, started


def unsupported(**_: Any) -> str | None:
    return None


def run(
    *,
    q: Array,
    k: Array,
    v: Array,
    memory: tuple[Array, ...],
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
    gated = log_momentum is not None
    start = started(tuple(jnp.broadcast_to(w, (B, *w.shape)) for w in memory), spec, gated)
    state = start if initial_state is None else jax.tree.map(lambda x, like: x.astype(like.dtype), initial_state, start)
    if segment_ids is None:
        starts_BT, real_BT = jnp.zeros((B, T), bool), jnp.ones((B, T), bool)
    else:
        starts_BT, real_BT = segments.starts(segment_ids), segment_ids != 0
    xs = {"q": q.astype(wide), "k": k.astype(wide), "v": v.astype(wide), "step": step}
    for name, gate in (("log_decay", log_decay), ("log_momentum", log_momentum), ("threshold", threshold)):
        if gate is not None:
            xs[name] = gate
    first_position, state = state.position, state._replace(position=None)

    def token(carry: tuple[MemoryState, Array], now: Any) -> tuple[Any, Array]:
        (state, position_B), (x, start_B, real_B) = carry, now
        position_B = jnp.where(start_B, 0, position_B)
        fresh_B = start_B
        if spec.reset_every:
            fresh_B = start_B | ((position_B % spec.reset_every == 0) & (position_B > 0) & real_B)
        state = jax.tree.map(lambda new, old: _where(fresh_B, new, old), start._replace(position=None), state)
        place_B = position_B % spec.chunk_size
        per_head = jax.vmap(lambda *args: _token(spec, row_weight, *args), in_axes=(0, 0, 0, None))
        per_row = jax.vmap(per_head, in_axes=(0, 0, None, 0))
        new, o_BHV = per_row(state, x, norm, place_B)
        last_B = place_B == spec.chunk_size - 1
        ends = jax.vmap(jax.vmap(lambda state, memory: _end_of_chunk(spec, row_weight, state, memory)), in_axes=(0, None))
        new = jax.tree.map(lambda a, b: _where(last_B, a, b), ends(new, memory), new)
        state = jax.tree.map(lambda a, b: _where(real_B, a, b), new, state)
        return (state, position_B + real_B), _where(real_B, o_BHV, jnp.zeros_like(o_BHV))

    by_token = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (xs, starts_BT, real_BT))
    with jax.default_matmul_precision("highest"):
        (state, position), o_TBHV = jax.lax.scan(token, (state, first_position), by_token)
    o = jnp.moveaxis(o_TBHV, 0, 1).astype(v.dtype)
    return (o, state._replace(position=position)) if return_final_state else o


def _token(spec: MemorySpec, row_weight: Any, state: MemoryState, x: dict[str, Array], norm: Any, place: Array) -> Any:
    """One token of one head: matrices (a, b), vectors (K,)."""
    anchor = state.anchor if spec.running else state.weights

    def predict(weights: Any, u: Array) -> Array:
        return network.forward(spec, [lambda u, w=w: u @ w for w in weights], u, norm)

    def objective(weights: Any) -> Array:
        return network.loss(spec, predict(weights, x["k"]), x["v"], x.get("threshold"))

    exposed = tuple(network.expose(spec, a) for a in anchor)
    gradients = jax.grad(objective)(exposed)
    writes = tuple(-x["step"][level] * g for level, g in enumerate(gradients))
    decay = jnp.exp(x["log_decay"]) if "log_decay" in x else 1.0
    if spec.rule == "descent":
        state = state._replace(weights=_add(_times(decay, state.weights), writes))
    elif spec.rule == "momentum":
        steps = _add(_times(jnp.exp(x["log_momentum"]), state.steps), writes)
        state = state._replace(steps=steps, weights=_add(_times(decay, state.weights), steps))
    else:
        state = state._replace(steps=_add(state.steps, writes))
    if state.gate_sum is not None:
        state = state._replace(gate_sum=state.gate_sum + jnp.exp(x["log_momentum"]))

    read = exposed
    if spec.rule == "mean":
        read = _add(state.weights, _times(row_weight[place], state.steps))
    elif spec.read == "token":
        scales = [network.link_scale(spec, a) for a in anchor]
        read = tuple(w if s is None else s * w for s, w in zip(scales, state.weights, strict=True))
    return state, predict(read, x["q"])


def _end_of_chunk(spec: MemorySpec, row_weight: Any, state: MemoryState, memory: tuple[Array, ...]) -> MemoryState:
    """What happens after the last token of a chunk of one head."""
    if spec.running:
        return state._replace(anchor=state.weights)
    nothing = _times(0.0, state.steps)
    if spec.rule == "mean":
        return state._replace(weights=_add(state.weights, _times(row_weight[-1], state.steps)), steps=nothing)
    steps = state.steps
    if state.gate_sum is not None:
        steps = _add(steps, _times(state.gate_sum / spec.chunk_size, state.previous))
        state = state._replace(previous=steps, gate_sum=0.0 * state.gate_sum)
    moved = _add(state.weights, tuple(network.orthogonalize(spec, s) for s in steps))
    renewed = tuple(network.renormalize(spec, w, initial) for w, initial in zip(moved, memory, strict=True))
    return state._replace(weights=renewed, steps=nothing)


def _add(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _times(factor: Any, a: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(factor * x for x in a)


def _where(mask_B: Array, a: Array, b: Array) -> Array:
    return jnp.where(mask_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)
