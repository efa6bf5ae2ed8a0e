"""PEER (arXiv 2407.04153): a few of very many experts of one neuron each, found by product keys."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, ChannelMixerConfig, Context, Kernel, save_point
from mlt.mixers.product_keys import ProductKeyMixer, key_problems
from mlt.nn.activations import ACTIVATIONS
from mlt.nn.param import fan_in, param
from mlt.parallel import ops


class PEER(ChannelMixerConfig):
    """y = sum over heads and their best experts of softmax(score) * activation(u . x) * v.

    Experts are rows of two tables, u and v. Queries have RMSNorm in place of the batch statistics of the paper, which
    packed documents would share.

    Attributes:
        num_keys: half keys of each kind; there are num_keys^2 experts.
        num_selected: experts that each head runs per token (K).
        num_heads: heads, each with queries and half keys of its own (H).
        key_dim: width of a query, both halves together.
        activation: of an expert's one neuron.
        query_norm: RMSNorm on the queries.
        bias: a bias on the queries.
        kernel: backend of the row lookup; None takes the best available, a name is strict, several are tried in order.
    """

    op: ClassVar[str] = "row_lookup"

    num_keys: int
    num_selected: int = 16
    num_heads: int = 8
    key_dim: int = 256
    activation: Literal["relu", "relu2", "gelu", "silu"] = "gelu"
    query_norm: bool = True
    bias: bool = False
    kernel: Kernel = None

    @property
    def num_experts(self) -> int:
        return self.num_keys**2

    def problems(self) -> Iterator[Problem]:
        yield from key_problems(self)

    def build(self, info: BuildInfo) -> "PEERMixer":
        return PEERMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        search = 2 * self.num_heads * self.key_dim * (d_model + self.num_keys)
        return search + 4 * self.num_heads * self.num_selected * d_model

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0

    def inactive_params(self, d_model: int) -> int:
        run = min(self.num_heads * self.num_selected, self.num_experts)
        return 2 * d_model * (self.num_experts - run)

    @classmethod
    def example(cls) -> tuple["PEER", BuildInfo]:
        config = cls(num_keys=16, num_selected=5, num_heads=2, key_dim=16)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class PEERMixer(ProductKeyMixer):
    def __init__(self, config: PEER, info: BuildInfo):
        self.config = config
        self.describe_keys(info, config)
        shape, axes = (config.num_experts, info.d_model), ("memory", None)
        self.up = param(shape, axes, fan_in(info.d_model), group="table")
        # Each token sums over H heads, whose weights sum to one.
        self.down = param(shape, axes, fan_in(config.num_heads, scale=info.residual_scale), group="table")

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        rows_BTHK, weights_BTHK = self.best_rows(x_BTD, ctx.rules, self.config.num_selected)
        flat = (*x_BTD.shape[:2], -1)
        rows_BTK = jnp.where(ctx.is_token[..., None], rows_BTHK.reshape(flat), -1)
        options = {"implementation": self.config.kernel}
        neuron_BTK = ACTIVATIONS[self.config.activation](ops.row_dot(ctx.rules, self.up[...], rows_BTK, x_BTD, **options))
        y_BTD = ops.row_lookup(ctx.rules, self.down[...], rows_BTK, weights_BTHK.reshape(flat) * neuron_BTK, **options)
        return save_point(y_BTD.astype(x_BTD.dtype), "memory_out"), {}
