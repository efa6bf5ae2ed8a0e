"""Product-key memory: a very large key-value table whose best rows are found by scoring two short lists of half keys."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, ChannelMixerConfig, Context, Kernel, save_point
from mlt.mixers.product_keys import ProductKeyMixer, key_problems
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in, normal, param
from mlt.parallel import ops


class Values(Config):
    """The rows that memory layers of one name share.

    Attributes:
        num_rows: of the table.
        width: of a row; None means d_model.
    """

    num_rows: int
    width: int | None = None

    def build(self, info: BuildInfo) -> "ValuesModule":
        return ValuesModule(self, info)


class ValuesModule(nnx.Module):
    def __init__(self, config: Values, info: BuildInfo):
        width = config.width or info.d_model
        self.values = param((config.num_rows, width), ("memory", None), normal(width**-0.5), group="table")


class ProductKeyMemory(ChannelMixerConfig):
    """p = sum over heads and their best rows of softmax(score) * value; y = W_out (p * silu(W_gate x)).

    Product-key memory (arXiv 1907.05242) with the input gate of Memory+ (arXiv 2412.09764), and with RMSNorm on the
    queries in place of batch statistics (the released Memory+ has query_norm=False and bias=True). Row i * num_keys + j
    has the key (first[i], second[j]), so its score is a sum of two, and the best rows of num_keys^2 are found exactly from
    the best of each half.

    Attributes:
        num_keys: half keys of each kind; the table has num_keys^2 rows (M).
        num_selected: rows that each head reads per token (K).
        num_heads: heads, each with queries and half keys of its own; all read one table (H).
        key_dim: width of a query, both halves together.
        value_dim: width of a row; None means d_model.
        gated: False is the plain form. Then y = p, with W_out only where value_dim is not d_model.
        query_norm: RMSNorm on the queries.
        bias: biases on the queries, the gate and the output.
        shared_values: name of a table that all layers with this name read, as Memory+ does; None is a table of its own.
        kernel: backend of the row lookup; None takes the best available, a name is strict, several are tried in order.
    """

    op: ClassVar[str] = "row_lookup"

    num_keys: int
    num_selected: int = 32
    num_heads: int = 4
    key_dim: int = 256
    value_dim: int | None = None
    gated: bool = True
    query_norm: bool = True
    bias: bool = False
    shared_values: str | None = None
    kernel: Kernel = None

    @property
    def num_rows(self) -> int:
        return self.num_keys**2

    @property
    def _values(self) -> Values:
        return Values(num_rows=self.num_rows, width=self.value_dim)

    def problems(self) -> Iterator[Problem]:
        yield from key_problems(self, ("value_dim",))

    def shares(self) -> Mapping[str, Config]:
        return {} if self.shared_values is None else {self.shared_values: self._values}

    def build(self, info: BuildInfo) -> "ProductKeyMemoryMixer":
        return ProductKeyMemoryMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        width = self.value_dim or d_model
        search = 2 * self.num_heads * self.key_dim * (d_model + self.num_keys)
        matrices = (2 if self.gated else int(width != d_model)) * 2 * d_model * width
        return search + 2 * self.num_heads * self.num_selected * width + matrices

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0

    def inactive_params(self, d_model: int) -> int:
        read = min(self.num_heads * self.num_selected, self.num_rows)
        return (self.value_dim or d_model) * ((self.num_rows if self.shared_values is None else 0) - read)

    @classmethod
    def example(cls) -> tuple["ProductKeyMemory", BuildInfo]:
        config = cls(num_keys=16, num_selected=6, num_heads=2, key_dim=16, value_dim=24)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class ProductKeyMemoryMixer(ProductKeyMixer):
    def __init__(self, config: ProductKeyMemory, info: BuildInfo):
        self.config = config
        self.describe_keys(info, config)
        d, v = info.d_model, config.value_dim or info.d_model
        self.values = config._values.build(info).values if config.shared_values is None else None
        self.gate = Linear((("embed", d),), (("ffn", v),), bias=config.bias) if config.gated else None
        out = Linear((("ffn", v),), (("embed", d),), init=fan_in(v, scale=info.residual_scale), bias=config.bias)
        self.output = out if config.gated or v != d else None

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        rows_BTHK, weights_BTHK = self.best_rows(x_BTD, ctx.rules, self.config.num_selected)
        rows_BTHK = jnp.where(ctx.is_token[..., None, None], rows_BTHK, -1)
        flat = (*x_BTD.shape[:2], rows_BTHK.shape[2] * rows_BTHK.shape[3])
        shared = self.config.shared_values
        values = self.values if shared is None else ctx.shared[shared].values
        p_BTV, aux = ops.row_lookup(
            ctx.rules,
            values[...],
            rows_BTHK.reshape(flat),
            weights_BTHK.reshape(flat),
            return_waiting=True,
            implementation=self.config.kernel,
        )
        y = save_point(p_BTV.astype(x_BTD.dtype), "memory_out")
        if self.gate is not None:
            y = y * jax.nn.silu(self.gate(x_BTD))
        return y if self.output is None else self.output(y), aux
