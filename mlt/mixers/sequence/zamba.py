"""Zamba2's hybrid layer (arXiv 2411.15242): a transformer whose weights several depths share, in front of a Mamba layer."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import mlt_kernels
from flax import nnx

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import (
    EMBEDDING,
    AroundMemory,
    Aux,
    BuildInfo,
    Context,
    Part,
    Published,
    SequenceMixerConfig,
    exchanging,
    save_point,
    shared_axis,
)
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sizes import not_divisor, not_positive
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm
from mlt.nn.param import fan_in, zeros
from mlt.nn.rope import apply_rope
from mlt.parallel import ops

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class SharedTransformer(Config):
    """t = mlp(norm(attention(norm([x ; e])))), e the embedded tokens; without residual additions of its own.

    Queries, keys and values are read from the 2 d_model channels of [x ; e]; the scores' factor is
    (head_dim / 2) ** -0.5, as released. The MLP is W_down (gelu(W_gate h) * W_up h).

    Attributes:
        num_heads: query heads (N).
        head_dim: width of a head (H); 2 d_model / num_heads in the released models.
        d_ff: hidden width of the MLP (F).
        num_kv_heads: key and value heads (K), a divisor of num_heads; None means num_heads.
        rope_base: base of the rotary embedding; None leaves positions out.
        norm_eps: of the two norms.
    """

    num_heads: int
    head_dim: int
    d_ff: int
    num_kv_heads: int | None = None
    rope_base: float | None = None
    norm_eps: float = 1e-5

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "num_heads", "head_dim", "d_ff", "num_kv_heads"))
        yield from sizes or not_divisor(self, "num_kv_heads", "num_heads")
        if self.rope_base is not None and self.rope_base <= 0:
            yield Problem("rope_base", self.rope_base, "must be positive", "None turns it off")

    def build(self, info: BuildInfo) -> "SharedTransformerModule":
        return SharedTransformerModule(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        projections = 4 * d_model * (width + 2 * keys) + 2 * width * d_model + 6 * d_model * self.d_ff
        return projections + 2 * width * (seq_len + 1)


class SharedTransformerModule(nnx.Module):
    def __init__(self, config: SharedTransformer, info: BuildInfo):
        self.config = config
        d, n, k, h = info.d_model, config.num_heads, config.kv_heads, config.head_dim
        both, stream, hidden = (("embed", 2 * d),), (("embed", d),), (("ffn", config.d_ff),)
        keys = ((shared_axis(k), k), ("head_dim", h))
        self.norm = RMSNorm(2 * d, axis="embed", eps=config.norm_eps)
        self.query = Linear(both, (("heads", n), ("head_dim", h)))
        self.key = Linear(both, keys)
        self.value = Linear(both, keys)
        self.mix = Linear((("heads", n), ("head_dim", h)), stream)
        self.ffn_norm = RMSNorm(d, axis="embed", eps=config.norm_eps)
        self.gate = Linear(stream, hidden)
        self.up = Linear(stream, hidden)
        self.down = Linear(hidden, stream)

    def __call__(
        self,
        x_BTD: jax.Array,
        ctx: Context,
        attend: Attend,
        adapter: "Adapter | None",
        attention_adapter: "AttentionAdapter | None",
    ) -> jax.Array:
        """t of the stream x; `attend` knows where keys and values come from, the adapters are those of this use."""
        both_BTE = self.norm(jnp.concatenate([x_BTD, ctx.published[EMBEDDING]["stream"]], axis=-1))
        q_BTNH, k_BTKH, v_BTKH = self.query(both_BTE), self.key(both_BTE), self.value(both_BTE)
        if attention_adapter is not None:
            q_BTNH = q_BTNH + attention_adapter.query(both_BTE)
            k_BTKH = k_BTKH + attention_adapter.key(both_BTE)
            v_BTKH = v_BTKH + attention_adapter.value(both_BTE)
        if self.config.rope_base is not None:
            q_BTNH, k_BTKH = (apply_rope(x, ctx.positions, base=self.config.rope_base) for x in (q_BTNH, k_BTKH))
        q_BTNH, k_BTKH, v_BTKH = (save_point(x, "attention_qkv") for x in (q_BTNH, k_BTKH, v_BTKH))
        o_BTNH = save_point(attend(q_BTNH, k_BTKH, v_BTKH), "attention_out")
        h_BTD = self.ffn_norm(self.mix(o_BTNH))
        gate_BTF, up_BTF = self.gate(h_BTD), self.up(h_BTD)
        if adapter is not None:
            low_BTR = adapter.down(h_BTD)
            gate_BTF, up_BTF = gate_BTF + adapter.gate(low_BTR), up_BTF + adapter.up(low_BTR)
        return self.down(save_point(jax.nn.gelu(gate_BTF, approximate=False) * up_BTF, "ffn_hidden"))


class Adapter(nnx.Module):
    """What one use adds to the shared MLP's first projections: a product of two thin matrices, zero at the start."""

    def __init__(self, d_model: int, d_ff: int, rank: int):
        low, hidden = ((None, rank),), (("ffn", d_ff),)
        self.down = Linear((("embed", d_model),), low)
        self.gate = Linear(low, hidden, init=zeros)
        self.up = Linear(low, hidden, init=zeros)


class LowRank(nnx.Module):
    """(x A) B through `rank` channels, zero at the start."""

    def __init__(self, inputs: int, rank: int, outputs: tuple[tuple[str | None, int], ...]):
        self.down = Linear((("embed", inputs),), ((None, rank),))
        self.up = Linear(((None, rank),), outputs, init=zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(self.down(x))


class AttentionAdapter(nnx.Module):
    """What one use adds to the shared queries, keys and values."""

    def __init__(self, d_model: int, transformer: SharedTransformer, rank: int):
        n, k, h = transformer.num_heads, transformer.kv_heads, transformer.head_dim
        keys = ((shared_axis(k), k), ("head_dim", h))
        self.query = LowRank(2 * d_model, rank, (("heads", n), ("head_dim", h)))
        self.key = LowRank(2 * d_model, rank, keys)
        self.value = LowRank(2 * d_model, rank, keys)


class ZambaLayer(SequenceMixerConfig):
    """y = memory(norm(x + W t)), t what the shared transformer makes of [x ; e]; W and the adapters are this layer's own.

    Parameters of the transformer belong to the stack (`stack.shared.<name>`); every layer that names it shares them. Keys and
    values are cached by each layer for itself.

    Attributes:
        name: of the shared transformer.
        transformer: what it is; the same in all layers that name it.
        memory: the recurrent mixer behind it.
        adapter_rank: rank of what this layer adds to the first projections of the shared MLP; None adds nothing.
        attention_adapter: it adds as much to the shared queries, keys and values, as in the 1.2B model.
        norm_eps: of the norm in front of the recurrent mixer.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "attention"
    pre_norm: ClassVar[bool] = False

    name: str
    transformer: SharedTransformer
    memory: SequenceMixerConfig
    adapter_rank: int | None = 128
    attention_adapter: bool = False
    norm_eps: float = 1e-5

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "adapter_rank")
        if self.attention_adapter and self.adapter_rank is None:
            yield Problem("attention_adapter", True, "has no rank", "set adapter_rank")
        if self.memory.context not in ("carry", "halo"):
            yield Problem("memory", type(self.memory).__name__, "is not a recurrent mixer", "use Mamba2, Mamba or another")

    def build(self, info: BuildInfo) -> "ZambaLayerMixer":
        return ZambaLayerMixer(self, info)

    def shares(self) -> Mapping[str, Config]:
        return {self.name: self.transformer}

    def reads(self, d_model: int) -> Mapping[str, Published]:
        return {EMBEDDING: {"stream": Part((d_model,), ("stream",))}}

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        adapter = 2 * (self.adapter_rank or 0) * (d_model + 2 * self.transformer.d_ff)
        if self.attention_adapter:
            t = self.transformer
            adapter += 2 * (self.adapter_rank or 0) * (6 * d_model + (t.num_heads + 2 * t.kv_heads) * t.head_dim)
        own = 2 * d_model * d_model + adapter + self.memory.flops_per_token(d_model, seq_len)
        return own + self.transformer.flops_per_token(d_model, seq_len)

    def state_size(self, d_model: int, seq_len: int) -> int:
        keys = self.transformer.kv_heads * self.transformer.head_dim
        return 2 * seq_len * keys + self.memory.state_size(d_model, seq_len)

    def inactive_params(self, d_model: int) -> int:
        return self.memory.inactive_params(d_model)

    @classmethod
    def example(cls) -> tuple["ZambaLayer", BuildInfo]:
        transformer = SharedTransformer(num_heads=4, num_kv_heads=2, head_dim=8, d_ff=24, rope_base=100.0)
        memory = Mamba2(num_heads=4, head_dim=8, state_dim=8)
        config = cls(name="block", transformer=transformer, memory=memory, adapter_rank=4, attention_adapter=True)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class ZambaLayerMixer(AroundMemory):
    def __init__(self, config: ZambaLayer, info: BuildInfo):
        self.config = config
        d, stream = info.d_model, (("embed", info.d_model),)
        rank = config.adapter_rank
        self.adapter = None if rank is None else Adapter(d, config.transformer.d_ff, rank)
        attends = rank is not None and config.attention_adapter
        self.attention_adapter = AttentionAdapter(d, config.transformer, rank) if attends else None
        self.join = Linear(stream, ((None, d),), init=fan_in(d))
        self.norm = RMSNorm(d, axis="embed", eps=config.norm_eps)
        self.memory = config.memory.build(info)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
            options = {"segment_ids": ctx.segment_ids, **self._options()}
            return ops.attention(ctx.rules, q_BTNH, k_BTKH, v_BTKH, **options)

        return self.memory(self._input(x_BTD, ctx, attend), exchanging(ctx, self.config.memory.exchange))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        part = (self.config.transformer.kv_heads, self.config.transformer.head_dim)
        keys = cache.empty_cache(batch, max_length, dtype, key=part, value=part)
        return {"keys": keys, "memory": self.memory.init_state(batch, max_length, dtype)}

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        new: dict[str, Any] = {}

        def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
            seen, new["keys"] = cache.extend(state["keys"], ctx, key=k_BTKH, value=v_BTKH)
            segments, positions = (ctx.segment_ids, seen["segment"]), (ctx.positions, seen["position"])
            options = {"segment_ids": segments, "positions": positions, **self._options()}
            return mlt_kernels.attention(q_BTNH, seen["key"], seen["value"], **options)

        y_BTD, new["memory"] = self.memory.step(self._input(x_BTD, ctx, attend), state["memory"], ctx)
        return y_BTD, new

    def _input(self, x_BTD: jax.Array, ctx: Context, attend: Attend) -> jax.Array:
        """What the recurrent mixer gets."""
        shared_BTD = ctx.shared[self.config.name](x_BTD, ctx, attend, self.adapter, self.attention_adapter)
        return self.norm(x_BTD + self.join(shared_BTD))

    def _options(self) -> dict[str, Any]:
        return {"scale": (self.config.transformer.head_dim / 2) ** -0.5, "implementation": self.config.kernel}
