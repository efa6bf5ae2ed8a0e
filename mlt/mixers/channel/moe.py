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
        router: how scores are made of logits.
        renormalize: divide the chosen scores by their sum.
        routed_scale: factor on the weights of the routed experts.
        num_groups: experts form this many groups of neighbours (nodes), ranked by their two best experts ...
        groups_per_token: ... and a token chooses inside its best groups_per_token groups.
        bias_update_rate: of the sigmoid router; None means 0.001. 0 keeps the biases where they are.
        balance_loss: coefficient of the row-wise balance loss.
        z_loss: coefficient of the z-loss.
        kernel: backend of the grouped matrix product; None takes the best available, a name is strict.
    """

    op: ClassVar[str] = "grouped_matmul"

    num_experts: int
    num_experts_per_token: int
    d_ff: int
    num_shared_experts: int = 0
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    renormalize: bool = True
    routed_scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    bias_update_rate: float | None = None
    balance_loss: float = 0.0
    z_loss: float = 0.0
    kernel: str | None = None

    @property
    def bias_rate(self) -> float:
        return 1e-3 if self.bias_update_rate is None else self.bias_update_rate

    def problems(self) -> Iterator[Problem]:
        for name in ("num_experts", "num_experts_per_token", "d_ff", "num_groups", "groups_per_token"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")
                return
        for name in ("num_shared_experts", "balance_loss", "z_loss", "bias_update_rate"):
            if (getattr(self, name) or 0) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")
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
        active = self.num_experts_per_token + self.num_shared_experts
        return 6 * d_model * self.d_ff * active + 2 * d_model * self.num_experts

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
        self.shared = SwiGLU(d_ff=config.num_shared_experts * f).build(info) if config.num_shared_experts else None

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        logits_BTE, scores_BTE = self.scores(x_BTD)
        experts_BTA, weights_BTA = self.choose(scores_BTE)
        load_BE = _row_load(experts_BTA, ctx.is_token, self.config.num_experts)
        y_BTD = self._run_experts(x_BTD, experts_BTA, weights_BTA, ctx.is_token, load_BE.sum(0))
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, ctx)[0]
        y_BTD = ctx.rules.constrain(y_BTD, ("batch", "seq", "stream"))
        return y_BTD, self._aux(logits_BTE, scores_BTE, load_BE, ctx) if ctx.train else {}

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

    def choose(self, scores_BTE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The experts of each token, best first, and the weights of their outputs: (B, T, A) int32 and float32."""
        config = self.config
        ranked_BTE = jax.lax.stop_gradient(scores_BTE)
        if self.router_bias is not None:
            ranked_BTE = ranked_BTE + self.router_bias[...]
        if config.groups_per_token < config.num_groups:
            ranked_BTE = _inside_best_groups(ranked_BTE, config.num_groups, config.groups_per_token)
        experts_BTA = jax.lax.top_k(ranked_BTE, config.num_experts_per_token)[1]
        weights_BTA = jnp.take_along_axis(scores_BTE, experts_BTA, axis=-1)
        if config.renormalize:
            weights_BTA = weights_BTA / (weights_BTA.sum(-1, keepdims=True) + 1e-20)
        return experts_BTA, weights_BTA * config.routed_scale

    def _run_experts(self, x_BTD, experts_BTA, weights_BTA, is_token_BT, load_E):
        """Sort the (token, expert) pairs by expert, run the experts on their rows, and sum each token's in its own order.

        Padding sorts behind the last expert, beyond every group, where the product is zero.
        """
        experts_NA = jnp.where(is_token_BT[..., None], experts_BTA, self.config.num_experts).reshape(-1, experts_BTA.shape[-1])
        order_R = jnp.argsort(experts_NA.reshape(-1), stable=True)
        numbers_R = jnp.arange(order_R.size, dtype=order_R.dtype)
        place_NA = jnp.zeros_like(order_R).at[order_R].set(numbers_R, unique_indices=True).reshape(experts_NA.shape)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        x_RD = save_point(_spread(x_ND, order_R, place_NA), "expert_in")

        def product(rows, kernel):
            return grouped_matmul(rows, kernel[...].astype(rows.dtype), load_E, implementation=self.config.kernel)

        hidden_RF = save_point(jax.nn.silu(product(x_RD, self.gate)) * product(x_RD, self.up), "expert_hidden")
        y_NAD = _collect(product(hidden_RF, self.down), order_R, place_NA)
        y_BTAD = y_NAD.reshape(*experts_BTA.shape, x_BTD.shape[-1])
        return (y_BTAD.astype(jnp.float32) * weights_BTA[..., None]).sum(2).astype(x_BTD.dtype)

    def _aux(self, logits_BTE, scores_BTE, load_BE, ctx):
        config, load_E = self.config, load_BE.sum(0)
        fair = load_E.sum() / config.num_experts
        violation = jnp.where(fair > 0, load_E.max() / jnp.maximum(fair, 1e-9) - 1.0, 0.0)
        aux = {"count/load": load_E, "metric/max_violation": violation}
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


def _inside_best_groups(ranked_BTE: jax.Array, num_groups: int, kept: int) -> jax.Array:
    """Rule out the experts outside each token's best groups, a group being worth its two best experts."""
    grouped = ranked_BTE.reshape(*ranked_BTE.shape[:-1], num_groups, ranked_BTE.shape[-1] // num_groups)
    worth = jax.lax.top_k(grouped, 2)[0].sum(-1)
    best = jax.lax.top_k(worth, kept)[1]
    is_best = (best[..., None] == jnp.arange(num_groups)).any(-2)
    return jnp.where(is_best[..., None], grouped, -jnp.inf).reshape(ranked_BTE.shape)


@jax.custom_vjp
def _spread(x_ND: jax.Array, order_R: jax.Array, place_NA: jax.Array) -> jax.Array:
    """Sorted row r is the token of the (token, slot) pair `order_R[r]`; `place_NA` says where each pair went.

    The gradient of a token is the sum over its slots, in their order, in float32: another gather and no scatter.
    """
    return _take(x_ND, order_R // place_NA.shape[1])


def _spread_fwd(x_ND, order_R, place_NA):
    return _spread(x_ND, order_R, place_NA), place_NA


def _spread_bwd(place_NA, grad_RD):
    return _take(grad_RD, place_NA).astype(jnp.float32).sum(1).astype(grad_RD.dtype), None, None


_spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def _collect(y_RD: jax.Array, order_R: jax.Array, place_NA: jax.Array) -> jax.Array:
    """Undo the sort: (N, A, D). The gradient is the sort again, a gather."""
    return _take(y_RD, place_NA)


def _collect_fwd(y_RD, order_R, place_NA):
    return _collect(y_RD, order_R, place_NA), order_R


def _collect_bwd(order_R, grad_NAD):
    return _take(grad_NAD.reshape(order_R.size, grad_NAD.shape[-1]), order_R), None, None


_collect.defvjp(_collect_fwd, _collect_bwd)


def _take(rows: jax.Array, at: jax.Array) -> jax.Array:
    return rows.at[at].get(mode="promise_in_bounds")
