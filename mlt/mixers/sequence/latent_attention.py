"""Multi-head latent attention (MLA, arXiv 2405.04434): keys and values are read out of one small latent per token."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import mlt_kernels

from mlt.config.problems import Problem
from mlt.mixers import cache
from mlt.mixers.base import Aux, BuildInfo, Context, Mixer, SequenceMixerConfig, save_point
from mlt.mixers.rope_scaling import RopeScaling
from mlt.mixers.sizes import not_positive
from mlt.nn.linear import Linear
from mlt.nn.norm import RMSNorm
from mlt.nn.param import fan_in
from mlt.nn.rope import apply_rope
from mlt.parallel import ops


class LatentAttention(SequenceMixerConfig):
    """c = norm(W_c x); k = [W_k c ; rope(W_r x)], v = W_v c; q = [W_qn u ; rope(W_qr u)] with u = norm(W_u x), or x.

    The rotated part of a key is shared by the heads. Training expands keys and values; decoding caches c and the rotated
    part alone and moves W_k to the query's side, W_v behind the attention, which is the same function.

    Attributes:
        num_heads: heads (N).
        key_dim: width of the part of a query or key that is not rotated.
        rotary_dim: width of the rotated part; 0 leaves it out.
        value_dim: width of a value; None means key_dim.
        kv_rank: width of the latent c.
        query_rank: width of the queries' latent u; None reads them from x.
        rope_base: base of the rotary embedding; None leaves positions out, the rotated part becoming a plain shared one.
        rope_scaling: stretched frequencies for more tokens than the model was first trained at.
        scale: factor on the scores; None means (key_dim + rotary_dim) ** -0.5.
        norm_eps: of the norms of the latents.
        window: a query sees this many tokens, itself included; None sees the whole document.
    """

    context: ClassVar[str] = "ring"
    op: ClassVar[str] = "attention"

    num_heads: int
    key_dim: int
    rotary_dim: int
    kv_rank: int
    value_dim: int | None = None
    query_rank: int | None = None
    rope_base: float | None = 10_000.0
    rope_scaling: RopeScaling | None = None
    scale: float | None = None
    norm_eps: float = 1e-6
    window: int | None = None

    @property
    def values(self) -> int:
        return self.value_dim or self.key_dim

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "key_dim", "kv_rank", "value_dim", "query_rank", "window")
        if self.rotary_dim < 0 or self.rotary_dim % 2:
            yield Problem("rotary_dim", self.rotary_dim, "must be even and not negative", "0 leaves the rotated part out")
        for name in ("rope_base", "scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                yield Problem(name, value, "must be positive")
        if self.rope_base is None and self.rope_scaling is not None:
            yield Problem(
                "rope_scaling", self.rope_scaling, "is read with rotary positions alone", "leave it None, or set rope_base"
            )

    def build(self, info: BuildInfo) -> "LatentAttentionMixer":
        return LatentAttentionMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        key, width = self.key_dim + self.rotary_dim, self.num_heads * self.values
        source = self.query_rank or d_model
        projections = source * self.num_heads * key + d_model * (self.kv_rank + self.rotary_dim + (self.query_rank or 0))
        projections += self.kv_rank * self.num_heads * (self.key_dim + self.values) + width * d_model
        if self.window is None or self.window >= seq_len:
            seen = (seq_len + 1) / 2
        else:
            seen = self.window - self.window * (self.window - 1) / (2 * seq_len)
        return 2 * projections + 2 * self.num_heads * (key + self.values) * seen

    def state_size(self, d_model: int, seq_len: int) -> int:
        return cache.slots(seq_len, self.window) * (self.kv_rank + self.rotary_dim)

    @classmethod
    def example(cls) -> tuple["LatentAttention", BuildInfo]:
        config = cls(num_heads=4, key_dim=8, rotary_dim=4, value_dim=6, kv_rank=12, query_rank=16)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class LatentAttentionMixer(Mixer):
    def __init__(self, config: LatentAttention, info: BuildInfo):
        self.config = config
        d, n, rank, rotary = info.d_model, config.num_heads, config.kv_rank, config.rotary_dim
        stream, latent, source = (("embed", d),), ((None, rank),), (("embed", d),)
        if config.query_rank is not None:
            self.query_down = Linear(stream, ((None, config.query_rank),))
            self.query_norm = RMSNorm(config.query_rank, eps=config.norm_eps)
            source = ((None, config.query_rank),)
        self.query = Linear(source, (("heads", n), ("head_dim", config.key_dim)))
        self.query_rotary = Linear(source, (("heads", n), ("head_dim", rotary))) if rotary else None
        self.down = Linear(stream, latent)
        self.norm = RMSNorm(rank, eps=config.norm_eps)
        self.key_rotary = Linear(stream, (("head_dim", rotary),)) if rotary else None
        self.key = Linear(latent, (("heads", n), ("head_dim", config.key_dim)))
        self.value = Linear(latent, (("heads", n), ("head_dim", config.values)))
        out_init = fan_in(n * config.values, scale=info.residual_scale)
        self.output = Linear((("heads", n), ("head_dim", config.values)), stream, init=out_init)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        q_BTNH, rotary_BTNR = self._queries(x_BTD, ctx)
        latent_BTC, shared_BTR = self._latent(x_BTD, ctx)
        k_BTNH, v_BTNP = self.key(latent_BTC), self.value(latent_BTC)
        if shared_BTR is not None:
            q_BTNH = jnp.concatenate([q_BTNH, rotary_BTNR], axis=-1)
            shared = jnp.broadcast_to(shared_BTR[:, :, None], rotary_BTNR.shape)
            k_BTNH = jnp.concatenate([k_BTNH, shared], axis=-1)
        q_BTNH, k_BTNH, v_BTNP = (save_point(part, "attention_qkv") for part in (q_BTNH, k_BTNH, v_BTNP))
        o_BTNP = ops.attention(ctx.rules, q_BTNH, k_BTNH, v_BTNP, segment_ids=ctx.segment_ids, **self._options())
        return self.output(save_point(o_BTNP, "attention_out")), {}

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        config = self.config
        width = config.kv_rank + config.rotary_dim
        return cache.empty_cache(batch, cache.slots(max_length, config.window), dtype, latent=(width,))

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        """Every head attends to one shared key per token: the latent beside the rotated part."""
        config = self.config
        q_BTNH, rotary_BTNR = self._queries(x_BTD, ctx)
        latent_BTC, shared_BTR = self._latent(x_BTD, ctx)
        new_BTL = latent_BTC if shared_BTR is None else jnp.concatenate([latent_BTC, shared_BTR], axis=-1)
        seen, kept = cache.extend(state, ctx, window=config.window, latent=new_BTL)
        q_BTNC = jnp.einsum("btnh,cnh->btnc", q_BTNH, self.key.kernel[...].astype(q_BTNH.dtype))
        if rotary_BTNR is not None:
            q_BTNC = jnp.concatenate([q_BTNC, rotary_BTNR], axis=-1)
        o_BTNC = mlt_kernels.attention(
            q_BTNC,
            seen["latent"][:, :, None],
            seen["latent"][:, :, None, : config.kv_rank],
            segment_ids=(ctx.segment_ids, seen["segment"]),
            positions=(ctx.positions, seen["position"]),
            **self._options(),
        )
        o_BTNP = jnp.einsum("btnc,cnp->btnp", o_BTNC, self.value.kernel[...].astype(o_BTNC.dtype))
        return self.output(o_BTNP), kept

    def _queries(self, x_BTD, ctx):
        source = x_BTD if self.config.query_rank is None else self.query_norm(self.query_down(x_BTD))
        rotary = None if self.query_rotary is None else self._rotated(self.query_rotary(source), ctx)
        return self.query(source), rotary

    def _latent(self, x_BTD, ctx):
        shared = None if self.key_rotary is None else self._rotated(self.key_rotary(x_BTD)[:, :, None], ctx)[:, :, 0]
        return self.norm(self.down(x_BTD)), shared

    def _rotated(self, x_BTNR, ctx):
        config = self.config
        if config.rope_base is None:
            return x_BTNR
        if config.rope_scaling is None:
            return apply_rope(x_BTNR, ctx.positions, base=config.rope_base)
        frequency = config.rope_scaling.frequencies(config.rope_base, config.rotary_dim)
        return apply_rope(x_BTNR, ctx.positions, base=config.rope_base, frequency=frequency, gain=config.rope_scaling.gain)

    def _options(self):
        config = self.config
        scale = (config.key_dim + config.rotary_dim) ** -0.5 if config.scale is None else config.scale
        return {"window": config.window, "scale": scale, "implementation": config.kernel}
