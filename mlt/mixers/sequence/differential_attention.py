"""Differential attention (arXiv 2410.05258): the difference of two softmax maps, which cancels what both attend to."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import mlt_kernels

from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import Arrays, Aux, BuildInfo, Context, Mixer, Part, Published, SequenceMixerConfig, save_point, shared_axis
from mlt.mixers.rope_scaling import rotation_form
from mlt.mixers.sizes import not_divisor, not_positive, rope_problems
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm, rms_normalize
from mlt.nn.param import buffer, fan_in, normal, numbered, param
from mlt.nn.rope import apply_rope
from mlt.parallel import ops


def lambda_at(layer: int) -> float:
    """The paper's `lambda_init` of layer 0, 1, ...: 0.8 - 0.6 e^(-0.3 layer)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class DifferentialAttention(SequenceMixerConfig):
    """A = softmax(q1 k1^T / sqrt(H)) - lambda softmax(q2 k2^T / sqrt(H)); out = W_o ((1 - lambda_init) norm(A v)).

    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init with learned vectors shared by the heads. The norm is an
    RMSNorm of each head of width 2 H, its scale shared by the heads.

    lambda_init is a constant, as good in the paper, or by `depth` that of each layer: 0.8 - 0.6 e^(-0.3 layer).

    Attributes:
        num_heads: pairs of query heads (N).
        head_dim: width of one query or key (H); values are twice as wide.
        num_kv_heads: pairs of key heads, each with one value head (K), a divisor of num_heads; None means num_heads.
        window: a query sees this many tokens, itself included; None sees the whole document.
        rope_base: base of the rotary embedding; None leaves positions out (NoPE).
        lambda_init: constant part of lambda; `lambda_at` gives the paper's for a layer.
        depth: number of the layer, from 0, in the first repeat of its period, and layers from one repeat to the next:
            lambda_init is then the paper's for each layer. None takes `lambda_init` for all repeats.
        norm_scale: the norm has a learned scale.
        norm_eps: of that norm.
        qkv_bias: biases on the three input projections.
        output_bias: a bias on the output projection.
        publish: name under which later layers may attend to this layer's keys and values; None publishes nothing.
    """

    context: ClassVar[str] = "ring"
    op: ClassVar[str] = "attention"

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    window: int | None = None
    rope_base: float | None = 10_000.0
    lambda_init: float = 0.8
    depth: tuple[int, int] | None = None
    norm_scale: bool = True
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    output_bias: bool = False
    publish: str | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "num_heads", "head_dim", "num_kv_heads", "window"))
        yield from sizes or not_divisor(self, "num_kv_heads", "num_heads")
        yield from rope_problems(self)
        yield from lambda_problems(self)
        if self.publish is not None and self.window is not None:
            yield Problem("publish", self.publish, "hands on the keys of all tokens, and a window keeps few", "use window=None")

    def build(self, info: BuildInfo) -> "DifferentialAttentionMixer":
        return DifferentialAttentionMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        queries, keys = 2 * self.num_heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        window = min(self.window or seq_len, seq_len)
        seen = window - window * (window - 1) / (2 * seq_len)
        return 2 * d_model * (2 * queries + 2 * keys) + 2 * queries * seen + 4 * queries * seen

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 4 * cache.slots(seq_len, self.window) * self.kv_heads * self.head_dim

    def publishes(self, d_model: int) -> Mapping[str, Published]:
        return {} if self.publish is None else {self.publish: differential_parts(self)}

    @classmethod
    def example(cls) -> tuple["DifferentialAttention", BuildInfo]:
        config = cls(num_heads=2, num_kv_heads=1, head_dim=8, window=24, depth=(3, 2), qkv_bias=True, output_bias=True)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


def differential_parts(config: Any) -> Published:
    """Keys of both maps and values, as a layer publishes them, and as one that attends to them takes them to be."""
    k, h, axes = config.kv_heads, config.head_dim, (shared_axis(config.kv_heads), "head_dim")
    keys = Part((k, h), axes, rotation_form(config.rope_base))
    return {"first": keys, "second": keys, "value": Part((k, 2 * h), axes)}


def lambda_problems(config: Any) -> Iterator[Problem]:
    """Rules of `lambda_init` and `depth`."""
    if not 0 <= config.lambda_init < 1:
        yield Problem("lambda_init", config.lambda_init, "must lie in [0, 1)")
    if config.depth is not None and (config.depth[0] < 0 or config.depth[1] < 0):
        yield Problem("depth", config.depth, "must be a layer's number and a distance, neither negative")


class DifferentialMixer(Mixer):
    """What the layers have in common: lambda, the norm of the difference and the output projection."""

    config: Any

    def _make_difference(self, info: BuildInfo, *, bias: bool) -> None:
        config = self.config
        n, h = config.num_heads, config.head_dim
        self.query_lambda = param((2, h), (None, None), normal(0.1), group="vector")
        self.key_lambda = param((2, h), (None, None), normal(0.1), group="vector")
        self.layer = None if config.depth is None else buffer((), (), numbered(*config.depth), dtype="int32")
        self.norm = RMSNorm(2 * h, eps=config.norm_eps) if config.norm_scale else None
        out_init = fan_in(2 * n * h, scale=info.residual_scale)
        self.output = Linear((("heads", n), ("head_dim", 2 * h)), (("embed", info.d_model),), init=out_init, bias=bias)

    def _finish(self, first_BTNP: jax.Array, second_BTNP: jax.Array) -> jax.Array:
        first, second = (save_point(o, "attention_out").astype(jnp.float32) for o in (first_BTNP, second_BTNP))
        constant = self.config.lambda_init
        if self.layer is not None:
            constant = 0.8 - 0.6 * jnp.exp(-0.3 * self.layer[...].astype(jnp.float32))
        plus, minus = jnp.exp(jnp.sum(self.query_lambda[...] * self.key_lambda[...], axis=-1))
        difference = first - (plus - minus + constant) * second
        normed = rms_normalize(difference, eps=self.config.norm_eps) if self.norm is None else self.norm(difference)
        return self.output(((1 - constant) * normed).astype(first_BTNP.dtype))


class DifferentialAttentionMixer(DifferentialMixer):
    def __init__(self, config: DifferentialAttention, info: BuildInfo):
        self.config = config
        d, n, k, h = info.d_model, config.num_heads, config.kv_heads, config.head_dim
        stream, keys = (("embed", d),), (shared_axis(k), k)
        self.query = Linear(stream, ((None, 2), ("heads", n), ("head_dim", h)), bias=config.qkv_bias)
        self.key = Linear(stream, ((None, 2), keys, ("head_dim", h)), bias=config.qkv_bias)
        self.value = Linear(stream, (keys, ("head_dim", 2 * h)), bias=config.qkv_bias)
        self._make_difference(info, bias=config.output_bias)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        return self.call_and_publish(x_BTD, ctx)[:2]

    def call_and_publish(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux, dict[str, Arrays]]:
        q, k, v_BTKP = self._project(x_BTD, ctx)
        options = {"segment_ids": ctx.segment_ids, **self._options()}
        maps = [ops.attention(ctx.rules, q[i], k[i], v_BTKP, **options) for i in (0, 1)]
        return self._finish(*maps), {}, self._published({"first": k[0], "second": k[1], "value": v_BTKP})

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        count, keys = cache.slots(max_length, config.window), (config.kv_heads, config.head_dim)
        value = (config.kv_heads, 2 * config.head_dim)
        return cache.empty_cache(batch, count, dtype, first=keys, second=keys, value=value)

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        return self.step_and_publish(x_BTD, state, ctx)[:2]

    def step_and_publish(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any, dict[str, Arrays]]:
        q, k, v_BTKP = self._project(x_BTD, ctx)
        seen, kept = cache.extend(state, ctx, window=self.config.window, first=k[0], second=k[1], value=v_BTKP)
        return self._finish(*attend_to_cache(q, seen, ctx, **self._options())), kept, self._published(seen)

    def _project(self, x_BTD, ctx):
        """Queries and keys as pairs, and values."""
        q_BT2NH, k_BT2KH, v_BTKP = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        q, k = ([x[:, :, i] for i in (0, 1)] for x in (q_BT2NH, k_BT2KH))
        if self.config.rope_base is not None:
            q, k = ([apply_rope(x, ctx.positions, base=self.config.rope_base) for x in pair] for pair in (q, k))
        q, k = ([save_point(x, "attention_qkv") for x in pair] for pair in (q, k))
        return q, k, save_point(v_BTKP, "attention_qkv")

    def _options(self):
        return {"window": self.config.window, "implementation": self.config.kernel}

    def _published(self, seen):
        return {} if self.config.publish is None else {self.config.publish: seen}


def attend_to_cache(q: list[jax.Array], seen: Arrays, ctx: Context, **options: Any) -> list[jax.Array]:
    """Both maps of new tokens over what a cache holds."""
    where = {"segment_ids": (ctx.segment_ids, seen["segment"]), "positions": (ctx.positions, seen["position"])}
    pairs = zip(q, ("first", "second"), strict=True)
    return [mlt_kernels.attention(query, seen[name], seen["value"], **where, **options) for query, name in pairs]
