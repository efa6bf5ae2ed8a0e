"""Mixture of experts: each token runs a few of many feed-forward experts."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from mlt_kernels import grouped_swiglu

from mlt.config.problems import Problem
from mlt.mixers import routing
from mlt.mixers.base import Aux, BuildInfo, ChannelMixerConfig, Context, Kernel, Mixer, save_point
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.nn.param import Buffer, buffer, fan_in, param, zeros
from mlt.parallel import ops
from mlt.parallel.expert import run_experts, within_capacity
from mlt.parallel.rules import Rules


class MoE(ChannelMixerConfig):
    """y = sum over the chosen experts of weight_i * SwiGLU_i(x), plus the shared experts.

    The sigmoid router is DeepSeek-V3's (arXiv 2412.19437): scores are sigmoids, experts are chosen by score + bias,
    weights come from the scores alone, and after each step the bias of an expert with less than its share of tokens
    rises by `bias_update_rate`, that of one with more falls. The softmax router is the classic one (arXiv 2101.03961).

    A balance loss is a coefficient times a value that is 1 where tokens are spread evenly and
    num_experts / num_experts_per_token where all of them go to the same experts, so coefficients of code bases that
    normalize otherwise do not carry over. `balance_loss` takes the value of each row and the mean over rows
    (DeepSeek-V3's sequence-wise loss), `global_balance_loss` that of the whole batch on all devices (arXiv 2501.11873).
    `z_loss` weighs the mean over rows of the mean square of the log-sum-exp of the router's logits. Means over rows do not
    move when a batch is cut into micro-batches. The global value then is the mean over micro-batches of sum_i f_i P_i, P_i
    being a micro-batch's own mean share of the scores and f_i the use of experts over all tokens of the step so far, that
    micro-batch's included: the buffer of arXiv 2501.11873, emptied after each step. The last micro-batch sees the use in the
    whole step, earlier ones what is known by then; no gradient flows through f. Balance losses couple documents: that of a
    row those packed together, the global one all.

    With `chunk_len` the experts are chosen once for so many tokens, counted from the document's start (Hydra, arXiv
    2508.15099): by the first of them, since the mean over a chunk would tell its tokens of later ones.

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
        global_balance_loss: coefficient of the balance loss over the batch.
        z_loss: coefficient of the z-loss.
        chunk_len: tokens that share their experts and weights; None routes token by token.
        capacity_factor: tokens of a row that an expert takes in training, as a multiple of an even share; what comes later
            in the row is dropped and counted, so documents compete for room. The same on every mesh. None, and decoding
            and evaluation always, drop nothing.
        kernel: backend of the grouped products; None takes the best available, a name is strict, several are tried in order.
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
    global_balance_loss: float = 0.0
    z_loss: float = 0.0
    chunk_len: int | None = None
    capacity_factor: float | None = None
    kernel: Kernel = None

    @property
    def bias_rate(self) -> float:
        return 1e-3 if self.bias_update_rate is None else self.bias_update_rate

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared experts together."""
        return self.num_shared_experts * self.d_ff if self.shared_d_ff is None else self.shared_d_ff

    @property
    def left_context(self) -> int:
        return 0 if self.chunk_len is None else self.chunk_len - 1

    def capacity(self, length: int) -> int | None:
        """Tokens of a row of this length that an expert takes in training; None takes them all."""
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * length * self.num_experts_per_token / self.num_experts)

    def problems(self) -> Iterator[Problem]:
        for name in ("num_experts", "num_experts_per_token", "d_ff", "num_groups", "groups_per_token"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")
                return
        for name in ("num_shared_experts", "balance_loss", "global_balance_loss", "z_loss", "bias_update_rate"):
            if (getattr(self, name) or 0) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")
        if self.shared_d_ff is not None and self.shared_d_ff < 1:
            yield Problem("shared_d_ff", self.shared_d_ff, "must be at least 1", "None means num_shared_experts * d_ff")
        for name in ("shared_d_ff", "shared_gate"):
            if getattr(self, name) and not self.num_shared_experts:
                yield Problem(name, getattr(self, name), "is read with shared experts alone", "set num_shared_experts")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            yield Problem("capacity_factor", self.capacity_factor, "must be positive", "None drops nothing")
        if self.chunk_len is not None and self.chunk_len < 2:
            yield Problem("chunk_len", self.chunk_len, "must be at least 2", "None routes token by token")
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
        return 0 if self.chunk_len is None else self.num_experts

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
        # Tokens of each expert in earlier micro-batches of a step; there within one alone, and never saved.
        self.load_before = nnx.data(None)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        logits_BTE = self.logits(x_BTD)
        if self.config.chunk_len is not None:
            logits_BTE = routing.chunk_heads(logits_BTE, ctx.positions, self.config.chunk_len, ctx.rules)
        return self._routed(x_BTD, logits_BTE, ctx)

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        """The logits that chose the last token's experts, where experts are chosen by chunks."""
        return {} if self.config.chunk_len is None else {"logits": jnp.zeros((batch, self.config.num_experts))}

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        logits_BTE = self.logits(x_BTD)
        if self.config.chunk_len is not None:
            logits_BTE = routing.from_heads(logits_BTE, ctx.positions, self.config.chunk_len, state["logits"])
            state = {"logits": logits_BTE[:, -1]}
        return self._routed(x_BTD, logits_BTE, ctx)[0], state

    def updated(self, aux: Mapping[str, jax.Array]) -> "MoEMixer":
        """Move each router bias by the update rate towards an even load; `aux["count/load"]` is the whole step's."""
        if self.router_bias is None:
            return self
        load = aux["count/load"].astype(jnp.float32)
        move = self.config.bias_rate * jnp.sign(load.mean(-1, keepdims=True) - load)
        moved = jax.tree.map(lambda leaf: leaf, self)
        moved.router_bias = self.router_bias.replace(self.router_bias[...] + move)
        return moved

    def within_step(self, aux: Mapping[str, jax.Array]) -> "MoEMixer":
        """Count on from the loads of earlier micro-batches, which the global balance loss reads."""
        if not self.config.global_balance_loss:
            return self
        counting = jax.tree.map(lambda leaf: leaf, self)
        counting.load_before = Buffer(aux["count/load"])
        return counting

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The router's logit of every expert, (B, T, E) float32."""
        return jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST)

    def scores(self, logits_BTE: jax.Array) -> jax.Array:
        return (jax.nn.sigmoid if self.config.router == "sigmoid" else jax.nn.softmax)(logits_BTE)

    def choose(self, scores_BTE: jax.Array, rules: Rules) -> tuple[jax.Array, jax.Array]:
        """The experts of each token, best first, and the weights of their outputs: (B, T, A) int32 and float32."""
        config = self.config
        ranked_BTE = jax.lax.stop_gradient(scores_BTE)
        if self.router_bias is not None:
            ranked_BTE = ranked_BTE + self.router_bias[...]
        if config.groups_per_token < config.num_groups:
            ranked_BTE = routing.inside_best_groups(ranked_BTE, config.num_groups, config.groups_per_token, rules)
        experts_BTA = ops.top_k(rules, ranked_BTE, config.num_experts_per_token, routing.EACH_EXPERT)[1]
        weights_BTA = jnp.take_along_axis(scores_BTE, experts_BTA, axis=-1)
        if config.renormalize:
            weights_BTA = weights_BTA / (weights_BTA.sum(-1, keepdims=True) + 1e-20)
        return experts_BTA, weights_BTA * config.routed_scale

    def _shared(self, x_BTD, ctx):
        y_BTD = self.shared(x_BTD, ctx)[0]
        if self.shared_gate is None:
            return y_BTD
        gate_BT = jnp.dot(x_BTD, self.shared_gate[...].astype(x_BTD.dtype), preferred_element_type=jnp.float32)
        return (y_BTD * jax.nn.sigmoid(gate_BT)[..., None]).astype(y_BTD.dtype)

    def _routed(self, x_BTD, logits_BTE, ctx):
        config = self.config
        scores_BTE = self.scores(logits_BTE)
        experts_BTA, weights_BTA = self.choose(scores_BTE, ctx.rules)
        y_BTD, dropped = self._run_experts(x_BTD, experts_BTA, weights_BTA, ctx)
        if self.shared is not None:
            y_BTD = y_BTD + self._shared(x_BTD, ctx)
        y_BTD = ctx.rules.constrain(y_BTD, ("batch", "seq", "stream"))
        if not ctx.train:
            return y_BTD, {}
        load_BE = routing.row_load(experts_BTA, ctx.is_token, config.num_experts)
        aux = {"count/load": load_BE.sum(0), **routing.told(logits_BTE, ctx.is_token, self._bias())}
        if dropped is not None:
            aux["count/dropped"] = dropped
        balance = (scores_BTE, load_BE, ctx.is_token, config.num_experts_per_token)
        if config.balance_loss:
            aux["loss/balance"] = config.balance_loss * routing.row_balance(*balance)
        if config.global_balance_loss:
            before_E = None if self.load_before is None else self.load_before[...]
            aux["loss/global_balance"] = config.global_balance_loss * routing.global_balance(*balance, before_E)
        if config.z_loss:
            aux["loss/z"] = config.z_loss * routing.z_term(logits_BTE, ctx.is_token)
        return y_BTD, aux

    def _bias(self):
        return None if self.router_bias is None else self.router_bias[...]

    def _run_experts(self, x_BTD, experts_BTA, weights_BTA, ctx):
        """Every token through its experts; (y, dropped pairs or None)."""
        takes_BTA, dropped = ctx.is_token[..., None], None
        capacity = self.config.capacity(x_BTD.shape[1]) if ctx.train else None
        if capacity is not None:
            fits_BTA = within_capacity(ctx.rules, experts_BTA, ctx.is_token, self.config.num_experts, capacity)
            dropped = jnp.sum(takes_BTA & ~fits_BTA, dtype=jnp.int32)
            takes_BTA = takes_BTA & fits_BTA
        experts_BTA = jnp.where(takes_BTA, experts_BTA, self.config.num_experts)
        kernels = tuple(kernel[...] for kernel in (self.gate, self.up, self.down))
        axes = (("experts", "embed", "ffn"), ("experts", "embed", "ffn"), ("experts", "ffn", "embed"))
        tokens = (x_BTD, experts_BTA, weights_BTA)
        return run_experts(ctx.rules, self._network, kernels, axes, *tokens, capacity=capacity), dropped

    def _network(self, x_RD, sizes_E, gate_EDF, up_EDF, down_EFD):
        x_RD = save_point(x_RD, "expert_in")
        kernels = (gate_EDF, up_EDF, down_EFD)
        return grouped_swiglu(x_RD, *kernels, sizes_E, hidden_name="expert_hidden", implementation=self.config.kernel)
