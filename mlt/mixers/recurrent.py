"""What recurrent mixers share: one description of the layer serves whole rows and decoding.

A recurrent mixer writes its layer once, as `mix(x_BTD, row)`, and takes its convolutions and recurrences from `row`. A
`Row` runs them over the mesh with every document starting from nothing; a `Continuation` goes on from a decoding state,
forgets what belongs to a document that has ended, and collects the state for the tokens to come.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mlt_kernels
from mlt_kernels.linear_recurrence import NormalizedState
from mlt_kernels.linear_recurrence.reference import EMPTY_LOG_SCALE

from mlt.errors import UserError
from mlt.mixers import cache
from mlt.mixers.base import Arrays, Aux, Context, Mixer, Part, Published, resume_segment
from mlt.mixers.conv import CausalConv
from mlt.parallel import ops, sequence
from mlt.parallel.local import CHANNELS, KV_HEADS, Q_HEADS, TOKENS, Axes, local

Scan = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Row:
    """A whole row of tokens, wherever its parts live.

    Attributes:
        ctx: what the call knows of its tokens.
        published: what the layer has handed to later ones.
    """

    def __init__(self, ctx: Context):
        self.ctx = ctx
        self.published: dict[str, Arrays] = {}

    def publish(self, name: str | None, **parts: jax.Array) -> None:
        """Hand arrays of these tokens to later layers under this name; None hands over nothing."""
        if name is not None:
            self.published[name] = parts

    def conv(self, name: str, conv: CausalConv, x: jax.Array) -> jax.Array:
        """The convolution `conv`, whose halo the decoding state keeps as `name`."""
        return conv(x, self.ctx)

    def linear_recurrence(
        self, q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHV: jax.Array, *, name: str = "memory", **options: Any
    ) -> jax.Array:
        """`mlt_kernels.linear_recurrence`, whose state the decoding state keeps as `name`."""
        return ops.linear_recurrence(self.ctx.rules, q_BTHK, k_BTHK, v_BTHV, **self._options(options))

    def diagonal_recurrence(self, a: jax.Array, b: jax.Array, *, name: str = "memory", **options: Any) -> jax.Array:
        """`mlt_kernels.diagonal_recurrence`, whose state the decoding state keeps as `name`."""
        return ops.diagonal_recurrence(self.ctx.rules, a, b, **self._options(options))

    def attention(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKP: jax.Array, *, window: int, name: str = "recent", **options: Any
    ) -> jax.Array:
        """`mlt_kernels.attention` in a window, whose keys and values the decoding state keeps as `name`."""
        segment_ids, rules = self.ctx.segment_ids, self.ctx.rules
        return ops.attention(rules, q_BTNH, k_BTKH, v_BTKP, segment_ids=segment_ids, window=window, **options)

    def attention_to_picked(
        self,
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKP: jax.Array,
        *,
        picked_BT: jax.Array,
        spacing: int,
        positions: tuple[jax.Array, jax.Array],
        name: str,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """`mlt_kernels.attention` of every token to some tokens, whose keys and values the decoding state keeps as `name`.

        Args:
            q_BTNH, k_BTKH, v_BTKP: as for attention, of all tokens.
            picked_BT: which tokens are keys; padding never is.
            spacing: at least so many tokens lie from one picked token to the next, the next one included.
            positions: (B, T) of the tokens as queries and as keys: a key is seen from its position on.
            name: in the decoding state, made by `cache.empty_picked`.
            options: window, softcap, scale, implementation.

        Returns:
            o (B, T, N, P) and its log-sum-exp (B, T, N).
        """
        size = self.ctx.rules.size("seq")

        def run(q, k, v, segments, picked, query_positions, key_positions):
            shapes = {"key": k.shape[2:], "value": v.shape[2:]}
            empty = cache.empty_picked(k.shape[0], -(-k.shape[1] // spacing), k.dtype, **shapes)
            keys = cache.pick(picked, empty, key=k, value=v, segment=segments, position=key_positions)
            keys = [keys[name] for name in ("key", "value", "segment", "position")]
            if size > 1:
                keys = [jax.lax.all_gather(x, sequence.AXIS, axis=1, tiled=True) for x in keys]
            return _attend(q, query_positions, segments, keys, options)

        picked_BT = picked_BT & self.ctx.is_token
        inputs = (Q_HEADS, KV_HEADS, KV_HEADS, TOKENS, TOKENS, TOKENS, TOKENS)
        arrays = (q_BTNH, k_BTKH, v_BTKP, self.ctx.segment_ids, picked_BT, *positions)
        return local(run, self.ctx.rules, inputs, (Q_HEADS, CHANNELS))(*arrays)

    def token_scan(self, fn: Scan, names: tuple[str, ...], arrays: tuple[jax.Array, ...], axes: tuple[Axes, ...]) -> jax.Array:
        """A loop over tokens that no sequence shard can start without the one before it.

        Args:
            fn: (state or None, segment_ids, *arrays) -> (y, last state), the state a dict.
            names: of the state's entries in the decoding state.
            arrays: of the whole mesh.
            axes: logical axes of each; the first one's lead y, which has the (batch, seq, heads) of it and one more dim.

        Raises:
            UserError: the sequence is split.
        """
        if self.ctx.rules.size("seq") > 1:
            raise UserError(
                f"mesh.context = {self.ctx.rules.size('seq')}: a layer of this model is a loop over tokens, which cannot be "
                "split along the sequence; use mesh.context=1 and more fsdp or tensor"
            )
        run = lambda segment_ids, *parts: fn(None, segment_ids, *parts)[0]  # noqa: E731
        return local(run, self.ctx.rules, (TOKENS, *axes), Q_HEADS)(self.ctx.segment_ids, *arrays)

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "segment_ids": self.ctx.segment_ids}


class Continuation(Row):
    """Tokens that come after a decoding state, on one device.

    Attributes:
        state: what was kept, empty again in rows whose document has ended. Caches stay: their slots name their document.
        new: what to keep for the tokens after these; complete once the layer has run.
    """

    def __init__(self, state: dict[str, Any], empty: dict[str, Any], ctx: Context):
        super().__init__(ctx)
        keep_B = resume_segment(state["segment"], ctx.segment_ids)
        self.state: dict[str, Any] = {
            name: kept if isinstance(kept, dict) else jax.tree.map(functools.partial(_select, keep_B), kept, empty[name])
            for name, kept in state.items()
        }
        self.new: dict[str, Any] = {"segment": ctx.segment_ids[:, -1]}

    def conv(self, name: str, conv: CausalConv, x: jax.Array) -> jax.Array:
        y, self.new[name] = conv.step(x, self.ctx.segment_ids, self.state[name])
        return y

    def linear_recurrence(
        self, q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHV: jax.Array, *, name: str = "memory", **options: Any
    ) -> jax.Array:
        o, self.new[name] = mlt_kernels.linear_recurrence(
            q_BTHK, k_BTHK, v_BTHV, initial_state=self.state[name], return_final_state=True, **self._options(options)
        )
        return o

    def diagonal_recurrence(self, a: jax.Array, b: jax.Array, *, name: str = "memory", **options: Any) -> jax.Array:
        h, self.new[name] = mlt_kernels.diagonal_recurrence(
            a, b, initial_state=self.state[name], return_final_state=True, **self._options(options)
        )
        return h

    def attention(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKP: jax.Array, *, window: int, name: str = "recent", **options: Any
    ) -> jax.Array:
        seen, self.new[name] = cache.extend(self.state[name], self.ctx, window=window, key=k_BTKH, value=v_BTKP)
        return mlt_kernels.attention(
            q_BTNH,
            seen["key"],
            seen["value"],
            segment_ids=(self.ctx.segment_ids, seen["segment"]),
            positions=(self.ctx.positions, seen["position"]),
            window=window,
            **options,
        )

    def attention_to_picked(
        self,
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKP: jax.Array,
        *,
        picked_BT: jax.Array,
        spacing: int,
        positions: tuple[jax.Array, jax.Array],
        name: str,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array]:
        new = {"key": k_BTKH, "value": v_BTKP, "segment": self.ctx.segment_ids, "position": positions[1]}
        self.new[name] = cache.pick(picked_BT & self.ctx.is_token, self.state[name], **new)
        keys = [self.new[name][part] for part in new]
        return _attend(q_BTNH, positions[0], self.ctx.segment_ids, keys, options)

    def token_scan(self, fn: Scan, names: tuple[str, ...], arrays: tuple[jax.Array, ...], axes: tuple[Axes, ...]) -> jax.Array:
        y, last = fn({name: self.state[name] for name in names}, self.ctx.segment_ids, *arrays)
        self.new.update(last)
        return y

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "segment_ids": self.ctx.segment_ids}


class RecurrentMixer(Mixer):
    """A mixer whose layer is written once, in `mix`; `init_state` names what its convolutions and recurrences keep."""

    config: Any

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        """The layer: y (B, T, D) of x (B, T, D)."""
        raise NotImplementedError

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        return self.mix(x_BTD, Row(ctx)), {}

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        row = Continuation(state, self.init_state(x_BTD.shape[0], 1, x_BTD.dtype), ctx)
        return self.mix(x_BTD, row), row.new


class PublishingMixer(RecurrentMixer):
    """A recurrent mixer whose `mix` may publish, through its row."""

    def call_and_publish(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux, dict[str, Arrays]]:
        row = Row(ctx)
        return self.mix(x_BTD, row), {}, row.published

    def step_and_publish(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any, dict[str, Arrays]]:
        row = Continuation(state, self.init_state(x_BTD.shape[0], 1, x_BTD.dtype), ctx)
        return self.mix(x_BTD, row), row.new, row.published


def empty_state(batch: int, dtype: jnp.dtype, convs: dict[str, CausalConv] | None = None, **memories: Any) -> dict[str, Any]:
    """Decoding state before the first token.

    Args:
        batch: rows.
        dtype: of the stream, in which convolutions keep their last inputs.
        convs: the convolutions, by the names that `mix` gives them.
        memories: shape of each float32 state without its batch dim, which starts at zero, or what it starts as.
    """
    halos = {name: conv.init_state(batch, dtype) for name, conv in (convs or {}).items()}
    states = {name: jnp.zeros((batch, *value), jnp.float32) if _is_shape(value) else value for name, value in memories.items()}
    return {**halos, **states, "segment": jnp.zeros((batch,), jnp.int32)}


def empty_normalized(batch: int, heads: int, keys: int, values: int) -> NormalizedState:
    """The state of a normalized recurrence before the first token."""
    return NormalizedState(
        jnp.zeros((batch, heads, keys, values), jnp.float32),
        jnp.zeros((batch, heads, keys), jnp.float32),
        jnp.full((batch, heads), EMPTY_LOG_SCALE, jnp.float32),
    )


def published_memory(name: str | None, channels: int) -> dict[str, Published]:
    """What a recurrence publishes that hands its read-out, before gate and norm, to later layers as `memory`."""
    return {} if name is None else {name: {"memory": Part((channels,), ("heads",))}}


def _attend(q_BTNH, positions_BT, segment_ids_BT, keys, options):
    """Attention to keys that are not those of the queries' row: (o, log-sum-exp)."""
    k_BSKH, v_BSKP, key_segments_BS, key_positions_BS = keys
    return mlt_kernels.attention(
        q_BTNH,
        k_BSKH,
        v_BSKP,
        segment_ids=(segment_ids_BT, key_segments_BS),
        positions=(positions_BT, key_positions_BS),
        return_lse=True,
        **options,
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(size, int) for size in value)


def _select(keep_B: jax.Array, kept: jax.Array, empty: jax.Array) -> jax.Array:
    return jnp.where(keep_B.reshape(-1, *[1] * (kept.ndim - 1)), kept, empty.astype(kept.dtype))
