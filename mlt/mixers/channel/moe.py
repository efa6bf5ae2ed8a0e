"""Mixture of experts: each token runs a few of many feed-forward experts; no token is ever dropped."""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from mlt_kernels import grouped_matmul

from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, ChannelMixerConfig, Context, Mixer, save_point
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.nn.param import buffer, fan_in, param, zeros
from mlt.parallel import ops
from mlt.parallel.expert import run_experts
from mlt.parallel.local import TOKENS
from mlt.parallel.rules import Rules


class MoE(ChannelMixerConfig):
    """y = sum over the chosen experts of weight_i * SwiGLU_i(x), plus the shared experts.

    The sigmoid router is DeepSeek-V3's (arXiv 2412.19437): scores are sigmoids, experts are chosen by score + bias,
    weights come from the scores alone, and after each step the bias of an expert with less than its share of tokens
    rises by `bias_update_rate`, that of one with more falls. The softmax router is the classic one (arXiv 2101.03961).

    Both losses are a coefficient times a mean over rows, so cutting a batch into micro-batches of rows does not move
    them. `balance_loss` weighs a value that is 1 where a row spreads its tokens evenly and
    num_experts / num_experts_per_token where all of them go to the same experts (coefficients of code bases that
    normalize otherwise do not carry over); `z_loss` weighs the mean square of the log-sum-exp of the router's logits.

    Attributes:
        num_experts: routed experts (E).
        num_experts_per_token: experts that each token runs (A).
        d_ff: hidden width of one expert (F).
        num_shared_experts: experts that every token runs besides; they form one SwiGLU of width num_shared_experts * d_ff.
        shared_d_ff: another width of that SwiGLU in place of num_shared_experts * d_ff.
        shared_gate: multiply its output by a sigmoid of the input, one number per token.
        router: how scores are made of logits.
        renormalize: divide the chosen scores by their sum.
        routed_scale: factor on the weights of the routed experts.
        num_groups: experts form this many groups of neighbours (nodes), ranked by their two best experts ...
        groups_per_token: ... and a token chooses inside its best groups_per_token groups.
        bias_update_rate: of the sigmoid router; None means 0.001. 0 keeps the biases where they are.
        balance_loss: coefficient of the row-wise balance loss.
        z_loss: coefficient of the z-loss.
        capacity_factor: rows that a shard of the experts takes from each device, as a multiple of an even share; what is
            over is dropped and counted, and documents compete for room. None drops nothing.
        kernel: backend of the grouped matrix product; None takes the best available, a name is strict.
    """

    op: ClassVar[str] = "grouped_matmul"

    num_experts: int
    num_experts_per_token: int
    d_ff: int
    num_shared_experts: int = 0
    shared_d_ff: int | None = None
    shared_gate: bool = False
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    renormalize: bool = True
    routed_scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    bias_update_rate: float | None = None
    balance_loss: float = 0.0
    z_loss: float = 0.0
    capacity_factor: float | None = None
    kernel: str | None = None

    @property
    def bias_rate(self) -> float:
        return 1e-3 if self.bias_update_rate is None else self.bias_update_rate

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared experts together."""
        return self.num_shared_experts * self.d_ff if self.shared_d_ff is None else self.shared_d_ff

    def problems(self) -> Iterator[Problem]:
        for name in ("num_experts", "num_experts_per_token", "d_ff", "num_groups", "groups_per_token"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")
                return
        for name in ("num_shared_experts", "balance_loss", "z_loss", "bias_update_rate"):
            if (getattr(self, name) or 0) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")
        if self.shared_d_ff is not None and self.shared_d_ff < 1:
            yield Problem("shared_d_ff", self.shared_d_ff, "must be at least 1", "None means num_shared_experts * d_ff")
        for name in ("shared_d_ff", "shared_gate"):
            if getattr(self, name) and not self.num_shared_experts:
                yield Problem(name, getattr(self, name), "is read with shared experts alone", "set num_shared_experts")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            yield Problem("capacity_factor", self.capacity_factor, "must be positive", "None drops nothing")
        if self.num_experts_per_token > self.num_experts:
            rule = f"must be at most num_experts = {self.num_experts}"
            yield Problem("num_experts_per_token", self.num_experts_per_token, rule)
        if self.router == "softmax" and self.bias_update_rate is not None:
            rule = "is read by the sigmoid router alone"
            yield Problem("bias_update_rate", self.bias_update_rate, rule, "leave it None, or use router='sigmoid'")
        yield from self._group_problems()

    def _group_problems(self) -> Iterator[Problem]:
        if self.num_groups == 1 and self.groups_per_token == 1:
            return
        if self.num_experts % self.num_groups or self.num_experts < 2 * self.num_groups:
            rule = f"must split num_experts = {self.num_experts} into equal groups of at least 2"
            sizes = [n for n in range(1, self.num_experts // 2 + 1) if self.num_experts % n == 0]
            yield Problem("num_groups", self.num_groups, rule, f"use one of {', '.join(map(str, sizes))}" if sizes else None)
            return
        if self.groups_per_token > self.num_groups:
            yield Problem("groups_per_token", self.groups_per_token, f"must be at most num_groups = {self.num_groups}")
            return
        reachable = self.groups_per_token * (self.num_experts // self.num_groups)
        if self.num_experts_per_token > reachable:
            rule = f"must be at most {reachable}, the experts in {self.groups_per_token} of {self.num_groups} groups"
            yield Problem("num_experts_per_token", self.num_experts_per_token, rule, "raise groups_per_token")

    def build(self, info: BuildInfo) -> "MoEMixer":
        return MoEMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        active = self.num_experts_per_token * self.d_ff + self.shared_width
        gate = 2 * d_model if self.shared_gate else 0
        return 6 * d_model * active + 2 * d_model * self.num_experts + gate

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0

    def inactive_params(self, d_model: int) -> int:
        return 3 * d_model * self.d_ff * (self.num_experts - self.num_experts_per_token)

    @classmethod
    def example(cls) -> tuple["MoE", BuildInfo]:
        config = cls(num_experts=8, num_experts_per_token=2, d_ff=16, num_shared_experts=1, routed_scale=2.5, z_loss=1e-3)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class MoEMixer(Mixer):
    def __init__(self, config: MoE, info: BuildInfo):
        self.config = config
        d, f, e = info.d_model, config.d_ff, config.num_experts
        self.router = param((d, e), ("embed", None), fan_in(d))
        self.router_bias = buffer((e,), (None,), zeros) if config.router == "sigmoid" else None
        self.gate = param((e, d, f), ("experts", "embed", "ffn"), fan_in(d))
        self.up = param((e, d, f), ("experts", "embed", "ffn"), fan_in(d))
        self.down = param((e, f, d), ("experts", "ffn", "embed"), fan_in(f, scale=info.residual_scale))
        self.shared = SwiGLU(d_ff=config.shared_width).build(info) if config.num_shared_experts else None
        self.shared_gate = param((d,), ("embed",), fan_in(d), group="matrix") if config.shared_gate else None

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        logits_BTE, scores_BTE = self.scores(x_BTD)
        experts_BTA, weights_BTA = self.choose(scores_BTE, ctx.rules)
        load_BE = _row_load(experts_BTA, ctx.is_token, self.config.num_experts)
        y_BTD, dropped = self._run_experts(x_BTD, experts_BTA, weights_BTA, ctx)
        if self.shared is not None:
            y_BTD = y_BTD + self._shared(x_BTD, ctx)
        y_BTD = ctx.rules.constrain(y_BTD, ("batch", "seq", "stream"))
        return y_BTD, self._aux(logits_BTE, scores_BTE, load_BE, dropped, ctx) if ctx.train else {}

    def updated(self, aux: Mapping[str, jax.Array]) -> "MoEMixer":
        """Move each router bias by the update rate towards an even load; `aux["count/load"]` is the whole step's."""
        if self.router_bias is None:
            return self
        load = aux["count/load"].astype(jnp.float32)
        move = self.config.bias_rate * jnp.sign(load.mean(-1, keepdims=True) - load)
        moved = jax.tree.map(lambda leaf: leaf, self)
        moved.router_bias = self.router_bias.replace(self.router_bias[...] + move)
        return moved

    def scores(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits and scores of every expert, (B, T, E) float32."""
        logits_BTE = jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST)
        return logits_BTE, (jax.nn.sigmoid if self.config.router == "sigmoid" else jax.nn.softmax)(logits_BTE)

    def choose(self, scores_BTE: jax.Array, rules: Rules) -> tuple[jax.Array, jax.Array]:
        """The experts of each token, best first, and the weights of their outputs: (B, T, A) int32 and float32."""
        config = self.config
        ranked_BTE = jax.lax.stop_gradient(scores_BTE)
        if self.router_bias is not None:
            ranked_BTE = ranked_BTE + self.router_bias[...]
        if config.groups_per_token < config.num_groups:
            ranked_BTE = _inside_best_groups(ranked_BTE, config.num_groups, config.groups_per_token, rules)
        experts_BTA = ops.top_k(rules, ranked_BTE, config.num_experts_per_token, (*TOKENS, None))[1]
        weights_BTA = jnp.take_along_axis(scores_BTE, experts_BTA, axis=-1)
        if config.renormalize:
            weights_BTA = weights_BTA / (weights_BTA.sum(-1, keepdims=True) + 1e-20)
        return experts_BTA, weights_BTA * config.routed_scale

    def _shared(self, x_BTD, ctx):
        y_BTD = self.shared(x_BTD, ctx)[0]
        if self.shared_gate is None:
            return y_BTD
        gate_BT = jnp.dot(x_BTD, self.shared_gate[...].astype(x_BTD.dtype), preferred_element_type=jnp.float32)
        return y_BTD * jax.nn.sigmoid(gate_BT)[..., None].astype(y_BTD.dtype)

    def _run_experts(self, x_BTD, experts_BTA, weights_BTA, ctx):
        """Every token through its experts; (y, dropped pairs)."""
        kernels = tuple(kernel[...].astype(x_BTD.dtype) for kernel in (self.gate, self.up, self.down))
        wide, narrow = ("experts", None, "ffn"), ("experts", "ffn", None)
        return run_experts(
            ctx.rules,
            self._network,
            kernels,
            (wide, wide, narrow),
            x_BTD,
            experts_BTA,
            weights_BTA,
            ctx.is_token,
            capacity_factor=self.config.capacity_factor,
        )

    def _network(self, x_RD, sizes_E, gate_EDF, up_EDF, down_EFD):
        def product(rows, kernel):
            return grouped_matmul(rows, kernel, sizes_E, implementation=self.config.kernel)

        x_RD = save_point(x_RD, "expert_in")
        hidden_RF = save_point(jax.nn.silu(product(x_RD, gate_EDF)) * product(x_RD, up_EDF), "expert_hidden")
        return product(hidden_RF, down_EFD)

    def _aux(self, logits_BTE, scores_BTE, load_BE, dropped, ctx):
        config, load_E = self.config, load_BE.sum(0)
        fair = load_E.sum() / config.num_experts
        violation = jnp.where(fair > 0, load_E.max() / jnp.maximum(fair, 1e-9) - 1.0, 0.0)
        aux = {"count/load": load_E, "metric/max_violation": violation}
        if config.capacity_factor is not None:
            aux["metric/dropped_pairs"] = dropped / jnp.maximum(load_E.sum(), 1)
        is_token_BT = ctx.is_token.astype(jnp.float32)
        tokens_B = jnp.maximum(is_token_BT.sum(1), 1.0)
        if config.balance_loss:
            share_BTE = scores_BTE / (scores_BTE.sum(-1, keepdims=True) + 1e-20)
            share_BE = (share_BTE * is_token_BT[..., None]).sum(1) / tokens_B[:, None]
            used_BE = load_BE * (config.num_experts / config.num_experts_per_token) / tokens_B[:, None]
            aux["loss/balance"] = config.balance_loss * (used_BE * share_BE).sum(-1).mean()
        if config.z_loss:
            square_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
            aux["loss/z"] = config.z_loss * ((square_BT * is_token_BT).sum(1) / tokens_B).mean()
        return aux


def _row_load(experts_BTA: jax.Array, is_token_BT: jax.Array, num_experts: int) -> jax.Array:
    """Tokens of each row that go to each expert, (B, E) int32. Padding does not count."""
    hits = experts_BTA[..., None] == jnp.arange(num_experts)
    return (hits & is_token_BT[..., None, None]).sum((1, 2), dtype=jnp.int32)


def _inside_best_groups(ranked_BTE: jax.Array, num_groups: int, kept: int, rules: Rules) -> jax.Array:
    """Rule out the experts outside each token's best groups, a group being worth its two best experts."""
    grouped = ranked_BTE.reshape(*ranked_BTE.shape[:-1], num_groups, ranked_BTE.shape[-1] // num_groups)
    worth = ops.top_k(rules, grouped, 2, (*TOKENS, None, None))[0].sum(-1)
    best = ops.top_k(rules, worth, kept, (*TOKENS, None))[1]
    is_best = (best[..., None] == jnp.arange(num_groups)).any(-2)
    return jnp.where(is_best[..., None], grouped, -jnp.inf).reshape(ranked_BTE.shape)
