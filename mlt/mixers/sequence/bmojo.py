"""B'MOJO (arXiv 2407.06324): softmax over recent tokens, a fading memory of older ones, and the few that it failed to foresee."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import mlt_kernels
from mlt_kernels.attention import merge

from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import AroundMemory, Aux, BuildInfo, Context, SequenceMixerConfig, exchanging, save_point, shared_axis
from mlt.mixers.blocks import ending_at, ends, last_tokens
from mlt.mixers.sequence.rg_lru import RGLRU
from mlt.mixers.sizes import not_divisor, not_positive
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in
from mlt.nn.rope import apply_rope
from mlt.parallel import sequence
from mlt.parallel.local import KV_HEADS, Q_HEADS, TOKENS, local


class BMojo(SequenceMixerConfig):
    """y = memory(x); q, k, v of x, and k', v' of y by the same projections; one softmax of q_i over

        recent      (k_j, v_j)      of tokens i - W + 1 .. i
        fading      (k'_j, v'_j)    of tokens i - 2 W + 1 .. i - W
        eidetic     (k_j, v_j)      of one token in each block of `interval` tokens that has left the recent window

    all in the document of i, whose blocks are counted from its start. The token of a block is the one that the memory
    foresaw worst, for each key head: the largest 1 - cos(v_j, v'_{j-1}), and the first token of a document before any
    other. No gradient flows through that choice. Rotary positions are those of the tokens. The paper's own test for what
    is kept is not public; without it (interval=None) this is the released B'MOJO-F.

    Attributes:
        num_heads: query heads (N).
        head_dim: width of a head (H).
        num_kv_heads: key and value heads (K), a divisor of num_heads; None means num_heads.
        window: recent tokens (W), the query's included.
        interval: tokens of a block, below the window; None keeps no token.
        memory: the fading memory, a recurrent mixer.
        rope_base: base of the rotary embedding; None leaves positions out.
        kernel: backend of the attention.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "attention"

    num_heads: int
    head_dim: int
    memory: SequenceMixerConfig
    num_kv_heads: int | None = None
    window: int = 2048
    interval: int | None = 64
    rope_base: float | None = 10_000.0

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "num_heads", "head_dim", "num_kv_heads", "window", "interval"))
        yield from sizes or not_divisor(self, "num_kv_heads", "num_heads")
        if self.interval is not None and self.interval >= self.window:
            yield Problem("interval", self.interval, f"must be below window = {self.window}")
        if self.rope_base is not None and (self.rope_base <= 0 or self.head_dim % 2):
            yield Problem("rope_base", self.rope_base, "must be positive, and head_dim even", "None turns positions off")
        if self.memory.context not in ("carry", "halo"):
            yield Problem("memory", type(self.memory).__name__, "is not a recurrent mixer", "use Mamba2, GatedDelta or another")

    def build(self, info: BuildInfo) -> "BMojoMixer":
        return BMojoMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        projections = 2 * d_model * self.head_dim * (2 * self.num_heads + 4 * self.kv_heads)
        seen = min(2 * self.window, seq_len)
        seen -= seen * (seen - 1) / (2 * seq_len)
        kept = 0 if self.interval is None else max(seq_len / 2 - self.window, 0) / self.interval
        attention = 4 * self.num_heads * self.head_dim * (seen + kept)
        return self.memory.flops_per_token(d_model, seq_len) + projections + attention

    def state_size(self, d_model: int, seq_len: int) -> int:
        kept = 0 if self.interval is None else max(seq_len // self.interval, 1)
        tokens = cache.slots(seq_len, self.window) + cache.slots(seq_len, 2 * self.window) + kept
        return self.memory.state_size(d_model, seq_len) + 2 * tokens * self.kv_heads * self.head_dim

    def inactive_params(self, d_model: int) -> int:
        return self.memory.inactive_params(d_model)

    @classmethod
    def example(cls) -> tuple["BMojo", BuildInfo]:
        memory = RGLRU(num_heads=2)
        config = cls(num_heads=4, head_dim=8, num_kv_heads=2, window=5, interval=3, memory=memory)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class BMojoMixer(AroundMemory):
    def __init__(self, config: BMojo, info: BuildInfo):
        self.config = config
        n, k, h = config.num_heads, config.kv_heads, config.head_dim
        stream, queries, keys = (
            (("embed", info.d_model),),
            (("heads", n), ("head_dim", h)),
            ((shared_axis(k), k), ("head_dim", h)),
        )
        # The memory feeds keys and values here, not the residual stream.
        self.memory = config.memory.build(dataclasses.replace(info, num_sub_layers=1))
        self.query = Linear(stream, queries)
        self.key = Linear(stream, keys)
        self.value = Linear(stream, keys)
        self.output = Linear(queries, stream, init=fan_in(n * h, scale=info.residual_scale))

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        config, interval = self.config, self.config.interval
        y_BTD, aux = self.memory(x_BTD, exchanging(ctx, config.memory.exchange))
        q_BTNH, recent, fading = self._project(x_BTD, y_BTD, ctx)
        size = ctx.rules.size("seq")

        def run(q, k, v, faded_k, faded_v, segments, positions):
            tokens = {"segment": segments, "position": positions}
            recent, fading = {"key": k, "value": v, **tokens}, {"key": faded_k, "value": faded_v, **tokens}
            if size > 1:
                recent, fading = sequence.with_front((recent, fading), 2 * config.window - 1, size)
            kept = None
            if interval is not None:
                shapes = {"key": k.shape[2:], "value": v.shape[2:]}
                empty = cache.empty_picked(k.shape[0], -(-k.shape[1] // interval), k.dtype, **shapes)
                kept = self._keep(interval, recent, fading, tokens, empty)
                if size > 1:
                    kept = {name: jax.lax.all_gather(kept[name], sequence.AXIS, axis=1, tiled=True) for name in recent}
            return self._attend(q, tokens, recent, fading, kept)

        inputs = (Q_HEADS, KV_HEADS, KV_HEADS, KV_HEADS, KV_HEADS, TOKENS, TOKENS)
        arrays = (q_BTNH, *recent.values(), *fading.values(), ctx.segment_ids, ctx.positions)
        o_BTNH = local(run, ctx.rules, inputs, Q_HEADS)(*arrays)
        return self.output(save_point(o_BTNH, "attention_out")), aux

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config, keys = self.config, (self.config.kv_heads, self.config.head_dim)
        window = lambda size: cache.empty_cache(batch, cache.slots(max_length, size), dtype, key=keys, value=keys)  # noqa: E731
        state = {"recent": window(config.window), "fading": window(2 * config.window)}
        if config.interval is not None:
            state["kept"] = cache.empty_picked(batch, max_length // config.interval, dtype, key=keys, value=keys)
        return {**state, "memory": self.memory.init_state(batch, max_length, dtype)}

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        config, new = self.config, {}
        y_BTD, new["memory"] = self.memory.step(x_BTD, state["memory"], ctx)
        q_BTNH, recent, fading = self._project(x_BTD, y_BTD, ctx)
        recent, new["recent"] = cache.extend(state["recent"], ctx, window=config.window, **recent)
        fading, new["fading"] = cache.extend(state["fading"], ctx, window=2 * config.window, **fading)
        tokens = {"segment": ctx.segment_ids, "position": ctx.positions}
        if config.interval is not None:
            new["kept"] = self._keep(config.interval, recent, fading, tokens, state["kept"])
        o_BTNH = self._attend(q_BTNH, tokens, recent, fading, new.get("kept"))
        return self.output(o_BTNH), new

    def _project(self, x_BTD, y_BTD, ctx):
        """(queries, keys and values of the stream, those of the memory)"""
        turn = lambda x: x if self.config.rope_base is None else apply_rope(x, ctx.positions, base=self.config.rope_base)  # noqa: E731
        named = lambda x: save_point(x, "attention_qkv")  # noqa: E731
        recent, fading = ({"key": named(turn(self.key(source))), "value": named(self.value(source))} for source in (x_BTD, y_BTD))
        return named(turn(self.query(x_BTD))), recent, fading

    def _keep(self, interval, recent, fading, tokens, store):
        """Add to the store the token of every block that ends among `tokens`, the last ones of `recent` and `fading`."""
        T = tokens["segment"].shape[1]
        # From the block that ends at the first new token on, and what the memory foresaw of these tokens.
        v_BSKH, segment_BS, k_BSKH = (last_tokens(recent[name], T + interval - 1) for name in ("value", "segment", "key"))
        foreseen_BSKH, before_BS = (last_tokens(fading[name], T + interval)[:, :-1] for name in ("value", "segment"))
        surprise_BSK = jax.lax.stop_gradient(1 - _cosine(v_BSKH, foreseen_BSKH))
        surprise_BSK = jnp.where((segment_BS == before_BS)[..., None], surprise_BSK, 2.0)
        worst_BTK = jnp.argmax(ending_at(surprise_BSK, T, interval), axis=2)
        place_BTK1 = (jnp.arange(T)[:, None] + worst_BTK)[..., None]
        key, value = (jnp.take_along_axis(x, place_BTK1, axis=1) for x in (k_BSKH, v_BSKH))
        return cache.pick(ends(tokens["segment"], tokens["position"], interval), store, key=key, value=value, **tokens)

    def _attend(self, q_BTNH, tokens, recent, fading, kept):
        window = self.config.window
        behind_BT = tokens["position"] - window
        parts = [(recent, tokens["position"], window), (fading, behind_BT, window)]
        parts = parts if kept is None else [*parts, (kept, behind_BT, None)]
        results = [
            mlt_kernels.attention(
                q_BTNH,
                keys["key"],
                keys["value"],
                segment_ids=(tokens["segment"], keys["segment"]),
                positions=(positions_BT, keys["position"]),
                window=size,
                return_lse=True,
                implementation=self.config.kernel,
            )
            for keys, positions_BT, size in parts
        ]
        return merge(results)[0].astype(q_BTNH.dtype)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = lambda u, v: jnp.sum(u * v, axis=-1)  # noqa: E731
    return product(a, b) * jax.lax.rsqrt(product(a, a) * product(b, b) + 1e-12)
