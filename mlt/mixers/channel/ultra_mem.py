"""UltraMem (arXiv 2411.12364) and UltraMemV2 (arXiv 2508.18756): memory rows found by Tucker-decomposed keys."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, ChannelMixerConfig, Context, Kernel, Mixer, save_point
from mlt.mixers.tucker_keys import Cells, TuckerKeys
from mlt.nn.linear import Linear
from mlt.nn.param import Init, buffer, fan_in, normal, numbered, param
from mlt.parallel import ops


class Ring(Config):
    """One pair of tables for several layers, each of which reads a window of it that wraps round at the end.

    With L layers of num_keys^2 rows there are N = L num_keys^2 rows in all. A layer addresses floor(sqrt(share N))^2 of them,
    from row num_keys^2 times its number on.

    Attributes:
        name: of the tables; layers that name one ring must agree on it.
        num_layers: L.
        share: part of all rows that a layer addresses; 1 / L are tables of its own.
        number: of this layer, from 0; in a period of blocks that of its first repeat ...
        stride: ... and how much further on each repeat is.
    """

    name: str
    num_layers: int
    share: float = 0.5
    number: int = 0
    stride: int = 1

    def problems(self) -> Iterator[Problem]:
        if self.num_layers < 1:
            yield Problem("num_layers", self.num_layers, "must be at least 1")
        if not 0 < self.share <= 1:
            yield Problem("share", self.share, "must lie in (0, 1]", "1 / num_layers gives each layer rows of its own")
        if not 0 <= self.number < max(self.num_layers, 1):
            yield Problem("number", self.number, f"must lie in [0, num_layers = {self.num_layers})")


class Tables(Config):
    """Rows of P and V, as layers share them.

    Attributes:
        num_rows, num_cores, value_dim, pre_value_dim, value_std: as in UltraMem; rows of all layers together.
    """

    num_rows: int
    num_cores: int
    value_dim: int
    pre_value_dim: int | None
    value_std: float

    def build(self, info: BuildInfo) -> "TablesModule":
        return TablesModule(self)


class UltraMem(ChannelMixerConfig):
    """y = W_o concat_c (sum over cells of g * s_c * V_c[row]), with g = P[row] . W_p x.

    A cell's two key places make a virtual row, which a fixed permutation scatters over key_expand^2 copies of the real
    rows; its score s_c comes from core c and weighs the c-th part of the value row. No softmax, no nonlinearity. In
    UltraMemV2 it stands beside the feed-forward network of every block: `Parallel(mixers=(SwiGLU(...), UltraMem(...)))`.
    Fields at their defaults are V2's; V1 has pre_value_dim=None and group_outputs=True.

    Attributes:
        num_keys: real keys of each axis; the table has num_keys^2 rows.
        num_selected: cells that each head reads per token (K).
        key_dim: width of a key.
        value_dim: width of a value row.
        pre_value_dim: width of a row of P; None reads values alone (g = 1).
        num_heads: heads, each with queries, keys and cores of its own; all read one table.
        rank: Tucker rank.
        num_cores: cores, and vertical parts of a value row.
        key_expand: virtual keys for each real one on each axis.
        group_outputs: an output matrix for each of the key_expand^2 copies, in place of one.
        value_std: of the rows at the start; `analytic_value_std` gives the published one.
        balance_loss: coefficient of a loss that is 1 on each axis where keys are used evenly; 0 in the final V2.
        ring: share the rows with other layers; None keeps them to this one.
        kernel: backend of the row lookup; None takes the best available, a name is strict, several are tried in order.
    """

    op: ClassVar[str] = "row_lookup"

    num_keys: int
    num_selected: int = 32
    key_dim: int = 192
    value_dim: int = 192
    pre_value_dim: int | None = 192
    num_heads: int = 1
    rank: int = 2
    num_cores: int = 2
    key_expand: int = 1
    group_outputs: bool = False
    value_std: float = 0.02
    balance_loss: float = 0.0
    ring: Ring | None = None
    kernel: Kernel = None

    @property
    def real_keys(self) -> int:
        """Real keys of each axis that the layer addresses."""
        return self.num_keys if self.ring is None else int((self.tables.num_rows * self.ring.share) ** 0.5)

    @property
    def num_rows(self) -> int:
        """Rows that the layer addresses."""
        return self.real_keys**2

    @property
    def num_virtual_keys(self) -> int:
        """Keys of each axis."""
        return self.real_keys * self.key_expand

    @property
    def tables(self) -> Tables:
        """The rows of this layer, or of all layers of the ring."""
        return Tables(
            num_rows=self.num_keys**2 * (1 if self.ring is None else self.ring.num_layers),
            num_cores=self.num_cores,
            value_dim=self.value_dim,
            pre_value_dim=self.pre_value_dim,
            value_std=self.value_std,
        )

    @property
    def num_groups(self) -> int:
        """Output matrices."""
        return self.key_expand**2 if self.group_outputs else 1

    def problems(self) -> Iterator[Problem]:
        names = ("num_keys", "num_selected", "key_dim", "value_dim", "num_heads", "rank", "num_cores", "key_expand")
        for name in (*names, "pre_value_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1")
                return
        if self.num_selected > self.num_virtual_keys:
            rule = f"must be at most {self.num_virtual_keys}, the keys of an axis"
            yield Problem("num_selected", self.num_selected, rule)
        if self.value_dim % self.num_cores:
            rule = f"must divide value_dim = {self.value_dim}: each core weighs an equal part of a row"
            yield Problem("num_cores", self.num_cores, rule)
        if max(self.num_virtual_keys**2, self.tables.num_rows * self.num_cores) > 2**31 - 1:
            rule = f"makes {self.num_virtual_keys**2} virtual rows; row ids are 32-bit"
            yield Problem("num_keys", self.num_keys, rule, "use fewer keys, or more layers with a memory of their own")
        for name in ("balance_loss", "value_std"):
            if getattr(self, name) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")

    def shares(self) -> Mapping[str, Config]:
        return {} if self.ring is None else {self.ring.name: self.tables}

    def build(self, info: BuildInfo) -> "UltraMemMixer":
        return UltraMemMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        keys = 4 * self.rank * self.key_dim * (d_model + self.num_virtual_keys)
        grid = 2 * self.num_cores * self.rank * self.num_selected**2
        read = 2 * self.num_selected * (self.value_dim + (self.pre_value_dim or 0))
        matrices = 2 * d_model * (self.value_dim * self.num_groups + (self.pre_value_dim or 0))
        return self.num_heads * (keys + grid + read) + matrices

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0

    def inactive_params(self, d_model: int) -> int:
        read = min(self.num_heads * self.num_selected, self.num_rows)
        return (self.value_dim + (self.pre_value_dim or 0)) * ((self.num_rows if self.ring is None else 0) - read)

    @classmethod
    def example(cls) -> tuple["UltraMem", BuildInfo]:
        config = cls(num_keys=12, num_selected=6, key_dim=16, value_dim=24, pre_value_dim=8, key_expand=2, balance_loss=1e-3)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class TablesModule(nnx.Module):
    def __init__(self, config: Tables):
        rows, axes, p = normal(config.value_std), ("memory", None), config.pre_value_dim
        # Row r's part for core c is row r * num_cores + c.
        parts = (config.num_rows * config.num_cores, config.value_dim // config.num_cores)
        self.values = param(parts, axes, rows, group="table")
        self.pre_values = None if p is None else param((config.num_rows, p), axes, rows, group="table")


class UltraMemMixer(Mixer):
    def __init__(self, config: UltraMem, info: BuildInfo):
        self.config = config
        d, p = info.d_model, config.pre_value_dim
        self.tucker = TuckerKeys(
            info,
            num_keys=config.num_virtual_keys,
            num_heads=config.num_heads,
            key_dim=config.key_dim,
            rank=config.rank,
            num_cores=config.num_cores,
        )
        virtual = config.num_virtual_keys**2
        scatter = Init(f"permutation({virtual})", lambda rng, shape: rng.permutation(shape[0]))
        self.permutation = buffer((virtual,), (None,), scatter, dtype="int32")
        self.tables = config.tables.build(info) if config.ring is None else None
        first = None if config.ring is None else (config.ring.number, config.ring.stride)
        self.number = None if first is None else buffer((), (), numbered(*first), dtype="int32")
        self.pre_query = None if p is None else Linear((("embed", d),), ((None, p),), init=fan_in(d))
        out = fan_in(config.value_dim * config.num_groups, scale=info.residual_scale)
        joined = ((None, config.num_groups), (None, config.num_cores), (None, config.value_dim // config.num_cores))
        self.output = Linear(joined, (("embed", d),), init=out)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        config, rules = self.config, ctx.rules
        cells = self.tucker(x_BTD, rules, config.num_selected)
        virtual = self.permutation[...][cells.rows * config.num_virtual_keys + cells.columns]
        virtual_BTK = virtual.reshape(*x_BTD.shape[:2], -1)
        tables = ctx.shared[config.ring.name] if config.ring is not None else self.tables
        rows_BTK = jnp.where(ctx.is_token[..., None], self._real(virtual_BTK), -1)
        weights_BTKC = cells.weights.reshape(*rows_BTK.shape, config.num_cores)
        if self.pre_query is not None:
            query_BTP = self.pre_query(x_BTD)
            g_BTK = ops.row_dot(rules, tables.pre_values[...], rows_BTK, query_BTP, implementation=config.kernel)
            weights_BTKC = weights_BTKC * g_BTK[..., None]
        parts = [
            self._pooled(tables.values[...], self._of_group(rows_BTK, virtual_BTK, group), weights_BTKC[..., core], core, rules)
            for group in range(config.num_groups)
            for core in range(config.num_cores)
        ]
        pooled = jnp.stack(parts, axis=-2).astype(x_BTD.dtype)
        pooled = pooled.reshape(*x_BTD.shape[:2], config.num_groups, config.num_cores, -1)
        y_BTD = self.output(save_point(pooled, "memory_out"))
        return y_BTD, {"loss/balance": self._balance(cells, ctx)} if config.balance_loss and ctx.train else {}

    def updated(self, aux: Mapping[str, jax.Array]) -> "UltraMemMixer":
        new = jax.tree.map(lambda leaf: leaf, self)
        new.tucker = self.tucker.remembered()
        return new

    def _of_group(self, rows_BTK, virtual_BTK, group):
        """The rows whose virtual row belongs to this copy."""
        if self.config.num_groups == 1:
            return rows_BTK
        return jnp.where(virtual_BTK // self.config.num_rows == group, rows_BTK, -1)

    def _real(self, virtual_BTK):
        rows_BTK = virtual_BTK % self.config.num_rows
        if self.number is None:
            return rows_BTK
        return (rows_BTK + self.number[...] * self.config.num_keys**2) % self.config.tables.num_rows

    def _pooled(self, values, rows_BTK, weights_BTK, core, rules):
        places = jnp.where(rows_BTK < 0, -1, rows_BTK * self.config.num_cores + core)
        return ops.row_lookup(rules, values, places, weights_BTK, implementation=self.config.kernel)

    def _balance(self, cells: Cells, ctx: Context) -> jax.Array:
        """Mean over rows and axes of num_keys * sum_j (share of the cells in j) * (mean softmax of j)."""
        is_token_BT = ctx.is_token.astype(jnp.float32)
        tokens_B = jnp.maximum(is_token_BT.sum(1), 1.0)
        size = self.config.num_virtual_keys
        total = 0.0
        for places, scores in zip((cells.rows, cells.columns), cells.projected, strict=True):
            share = jnp.einsum("bthn,bt->bhn", jax.nn.softmax(scores, axis=-1), is_token_BT) / tokens_B[:, None, None]
            row, _, head, _ = jnp.indices(places.shape, sparse=True)
            hits = jnp.zeros_like(share).at[row, head, places].add(is_token_BT[..., None, None])
            used = hits / (tokens_B[:, None, None] * self.config.num_selected)
            total = total + size * (used * share).sum(-1).mean() / 2
        return self.config.balance_loss * total


def analytic_value_std(
    *,
    d_model: int,
    d_ff: int,
    num_layers: int,
    num_selected: int,
    value_dim: int,
    pre_value_dim: int,
    num_heads: int = 1,
    score_variance: float = 1.0,
) -> float:
    """Standard deviation of P and V at which the memory's output varies as much as the feed-forward network's.

    std^4 = 0.2 d_ff d / (K H (1 + score_variance) D_p D_v L), appendix A of arXiv 2508.18756 (printed there without the root).

    Args:
        score_variance: of the scores of the cells kept, whose mean is tuned to 1; measured on a first batch.
    """
    read = num_selected * num_heads * (1.0 + score_variance) * pre_value_dim * value_dim * num_layers
    return float(np.sqrt(np.sqrt(0.2 * d_ff * d_model / read)))
