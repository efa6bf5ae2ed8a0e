"""Softmax attention: grouped-query, windowed, with rotary positions or none, QK-norm, sinks and an output gate."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from mlt_kernels import attention

from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import (
    Arrays,
    Aux,
    BuildInfo,
    Context,
    Mixer,
    Part,
    Published,
    SequenceMixerConfig,
    save_point,
    shared_axis,
)
from mlt.mixers.rope_scaling import RopeScaling, rotation, rotation_form, rotation_problems
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm
from mlt.nn.param import constant, fan_in, param, zeros
from mlt.nn.rope import apply_rope
from mlt.parallel import ops


class Attention(SequenceMixerConfig):
    """Causal softmax attention inside each document.

    Attributes:
        num_heads: query heads (N).
        num_kv_heads: key and value heads (K), a divisor of num_heads; None means num_heads.
        head_dim: width of a head (H).
        window: a query sees this many tokens, itself included; None sees the whole document.
        rope_base: base of the rotary embedding; None leaves positions out (NoPE).
        rotary_dim: the first channels of a head that are rotated, an even number; None means all.
        rope_scaling: stretched frequencies for more tokens than the model was first trained at.
        scale: factor on the scores; None means head_dim ** -0.5.
        qk_norm: RMSNorm queries and keys per head before the rotation.
        norm_eps: of these norms.
        unit_offset_norm: they multiply by 1 + scale.
        sinks: one learned logit per head joins the softmax denominator (arXiv 2309.17453, learned form).
        output_gate: multiply the result by a sigmoid of the input, per channel.
        softcap: scores become cap * tanh(score / cap).
        qkv_bias: biases on the three input projections.
        output_bias: a bias on the output projection.
        publish: name under which later layers may attend to this layer's `key` and `value` (YOCO, arXiv 2405.05254); while
            decoding, to its cache. None publishes nothing.
        publish_values: name under which later layers may mix this layer's `value` into theirs.
        value_residual: name of such values, mixed as a v_published + b v into this layer's own (ResFormer,
            arXiv 2410.17897).
        value_mix: a and b are one half, or learned from there.
    """

    context: ClassVar[str] = "ring"
    op: ClassVar[str] = "attention"

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    window: int | None = None
    rope_base: float | None = 10_000.0
    rotary_dim: int | None = None
    rope_scaling: RopeScaling | None = None
    scale: float | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-6
    unit_offset_norm: bool = False
    sinks: bool = False
    output_gate: bool = False
    softcap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    publish: str | None = None
    publish_values: str | None = None
    value_residual: str | None = None
    value_mix: Literal["half", "learned"] = "half"

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def problems(self) -> Iterator[Problem]:
        for name in ("num_heads", "head_dim", "num_kv_heads", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1")
                return
        for name in ("softcap", "scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                ways_out = "None means head_dim ** -0.5" if name == "scale" else "None turns it off"
                yield Problem(name, value, "must be positive", ways_out)
        if self.num_heads % self.kv_heads:
            divisors = ", ".join(str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0)
            yield Problem("num_kv_heads", self.num_kv_heads, f"must divide num_heads = {self.num_heads}", f"use {divisors}")
        if self.publish is not None and self.window is not None:
            yield Problem("publish", self.publish, "hands on the keys of all tokens, and a window keeps few", "use window=None")
        if self.value_residual is None and self.value_mix != "half":
            yield Problem("value_mix", self.value_mix, "is read with a value residual alone", "set value_residual")
        yield from rotation_problems(self)

    def build(self, info: BuildInfo) -> "AttentionMixer":
        return AttentionMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width = self.num_heads * self.head_dim
        projections = 2 * d_model * (2 * width + 2 * self.kv_heads * self.head_dim + (width if self.output_gate else 0))
        if self.window is None or self.window >= seq_len:
            seen = (seq_len + 1) / 2
        else:
            seen = self.window - self.window * (self.window - 1) / (2 * seq_len)
        return projections + 4 * width * seen

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 2 * cache.slots(seq_len, self.window) * self.kv_heads * self.head_dim

    def publishes(self, d_model: int) -> Mapping[str, Published]:
        found = {} if self.publish is None else {self.publish: key_value_parts(self)}
        return found if self.publish_values is None else {**found, self.publish_values: self._value_part()}

    def reads(self, d_model: int) -> Mapping[str, Published]:
        return {} if self.value_residual is None else {self.value_residual: self._value_part()}

    def _value_part(self) -> Published:
        return {"value": key_value_parts(self)["value"]}

    @classmethod
    def example(cls) -> tuple["Attention", BuildInfo]:
        config = cls(num_heads=4, num_kv_heads=2, head_dim=8, window=24, qk_norm=True, sinks=True, output_gate=True)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


def key_value_parts(config: Any) -> Published:
    """Keys and values, as an attention layer publishes them, and as one that attends to them takes them to be."""
    sizes, axes = (config.kv_heads, config.head_dim), (shared_axis(config.kv_heads), "head_dim")
    form = rotation_form(config.rope_base, config.rotary_dim, config.rope_scaling)
    return {"key": Part(sizes, axes, form), "value": Part(sizes, axes)}


class AttentionMixer(Mixer):
    def __init__(self, config: Attention, info: BuildInfo):
        self.config = config
        d, n, k, h = info.d_model, config.num_heads, config.kv_heads, config.head_dim
        self.query = Linear((("embed", d),), (("heads", n), ("head_dim", h)), bias=config.qkv_bias)
        self.key = Linear((("embed", d),), ((shared_axis(k), k), ("head_dim", h)), bias=config.qkv_bias)
        self.value = Linear((("embed", d),), ((shared_axis(k), k), ("head_dim", h)), bias=config.qkv_bias)
        self.gate = Linear((("embed", d),), (("heads", n), ("head_dim", h))) if config.output_gate else None
        norm = {"eps": config.norm_eps, "unit_offset": config.unit_offset_norm}
        self.query_norm = RMSNorm(h, **norm) if config.qk_norm else None
        self.key_norm = RMSNorm(h, **norm) if config.qk_norm else None
        self.sinks = param((n,), ("heads",), zeros, group="vector") if config.sinks else None
        self.value_mix = param((2,), (None,), constant(0.5), group="vector") if config.value_mix == "learned" else None
        out_init = fan_in(n * h, scale=info.residual_scale)
        self.output = Linear((("heads", n), ("head_dim", h)), (("embed", d),), init=out_init, bias=config.output_bias)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        return self.call_and_publish(x_BTD, ctx)[:2]

    def call_and_publish(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux, dict[str, Arrays]]:
        own_BTKH, (q_BTNH, k_BTKH, v_BTKH) = self._project(x_BTD, ctx)
        o_BTNH = ops.attention(
            ctx.rules, q_BTNH, k_BTKH, v_BTKH, segment_ids=ctx.segment_ids, sinks=self._sinks(), **self._options()
        )
        return self._finish(o_BTNH, x_BTD), {}, self._published({"key": k_BTKH, "value": v_BTKH}, own_BTKH)

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        """A cache of keys and values: the last `window - 1` tokens, or all of `max_length`."""
        heads = (self.config.kv_heads, self.config.head_dim)
        return cache.empty_cache(batch, cache.slots(max_length, self.config.window), dtype, key=heads, value=heads)

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        """Attend to the cache and to the new tokens; the window keeps its last tokens, the full cache appends."""
        return self.step_and_publish(x_BTD, state, ctx)[:2]

    def step_and_publish(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any, dict[str, Arrays]]:
        own_BTKH, (q_BTNH, k_BTKH, v_BTKH) = self._project(x_BTD, ctx)
        seen, kept = cache.extend(state, ctx, window=self.config.window, key=k_BTKH, value=v_BTKH)
        o_BTNH = attention(
            q_BTNH,
            seen["key"],
            seen["value"],
            segment_ids=(ctx.segment_ids, seen["segment"]),
            positions=(ctx.positions, seen["position"]),
            sinks=self._sinks(),
            **self._options(),
        )
        return self._finish(o_BTNH, x_BTD), kept, self._published(seen, own_BTKH)

    def _project(self, x_BTD, ctx):
        """The layer's own values, and queries, keys and values as they attend."""
        q_BTNH, k_BTKH, own_BTKH = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        v_BTKH = self._values(own_BTKH, x_BTD, ctx)
        if self.query_norm is not None:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if self.config.rope_base is not None:
            q_BTNH, k_BTKH = (apply_rope(x, ctx.positions, **rotation(self.config)) for x in (q_BTNH, k_BTKH))
        return own_BTKH, tuple(save_point(part, "attention_qkv") for part in (q_BTNH, k_BTKH, v_BTKH))

    def _values(self, own_BTKH, x_BTD, ctx):
        """The values that attend: the layer's own, with those of an earlier layer mixed in."""
        if self.config.value_residual is None:
            return own_BTKH
        earlier_BTKH = ctx.published[self.config.value_residual]["value"]
        if self.value_mix is None:
            return (earlier_BTKH + own_BTKH) * 0.5
        mix = self.value_mix[...]
        return (mix[0] * earlier_BTKH + mix[1] * own_BTKH).astype(own_BTKH.dtype)

    def _published(self, seen, own_BTKH):
        config = self.config
        found = {} if config.publish is None else {config.publish: seen}
        return found if config.publish_values is None else {**found, config.publish_values: {"value": own_BTKH}}

    def _options(self):
        config = self.config
        options = {"window": config.window, "softcap": config.softcap, "scale": config.scale}
        return {**options, "implementation": config.kernel}

    def _sinks(self):
        return None if self.sinks is None else self.sinks[...]

    def _finish(self, o_BTNH, x_BTD):
        o_BTNH = save_point(o_BTNH, "attention_out")
        if self.gate is not None:
            o_BTNH = o_BTNH * nnx.sigmoid(self.gate(x_BTD))
        return self.output(o_BTNH)
