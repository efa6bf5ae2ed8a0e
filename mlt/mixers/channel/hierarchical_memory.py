"""Hierarchical memories (arXiv 2510.02375): a feed-forward layer widened by blocks that a document's cluster path points to."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlt.config.problems import Problem
from mlt.mixers.base import CLUSTERS, Aux, BuildInfo, ChannelMixerConfig, Context, save_point
from mlt.mixers.channel.swiglu import SwiGLU, SwiGLUMixer
from mlt.mixers.sizes import not_positive
from mlt.nn.param import Init, param
from mlt.parallel import fetched, ops
from mlt.parallel.table import MOST_LOCAL_ROWS

GENERIC = -1
"""Cluster id of a document that reads the generic block."""

ROW_MULTIPLE = 256
"""The bank is padded to a multiple of this many rows, so that it splits over any likely number of devices."""


class HierarchicalMemory(ChannelMixerConfig):
    """y = FFN(x) + sum over levels l of W_down (silu(W_gate x) * W_up x), W those of block i_l of level l.

    Documents lie in a tree of clusters of `branching` children each. A document's path (i_1, ..., i_p) picks one block of
    `units[l]` hidden units a level; the batch brings the id of its leaf, whose leading digits are the path, or -1 for the generic
    block, of as many units and of no cluster. The bank is one table, a hidden unit a row: its gate, up and down vectors. Down
    vectors start at zero, so that a model that is given memories starts as what it was.

    Attributes:
        d_ff: hidden width of the layer that is always there.
        units: hidden units of a block of each level (r_1, ..., r_p); 0 has no blocks there.
        branching: children of a cluster (k); level l has k^l blocks.
        max_runs: stretches of tokens of one cluster that a row of a sequence shard may have. Tokens behind so many read no
            memory and are counted in the metric `tokens_without_memory`; the loader keeps below it.
    """

    d_ff: int
    units: tuple[int, ...]
    branching: int = 16
    max_runs: int = 16

    @property
    def num_clusters(self) -> int:
        return self.branching ** len(self.units)

    @property
    def cluster_runs(self) -> int:
        return self.max_runs

    @property
    def fetched_units(self) -> int:
        """Hidden units that a document reads (U)."""
        return sum(self.units)

    @property
    def bank_units(self) -> int:
        """Hidden units of all clusters' blocks, without the generic one."""
        return sum(units * self.branching**level for level, units in enumerate(self.units, 1))

    @property
    def num_rows(self) -> int:
        """Of the table: the bank, the generic block and padding."""
        return -(-(self.bank_units + self.fetched_units) // ROW_MULTIPLE) * ROW_MULTIPLE

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "d_ff", "max_runs")
        if self.branching < 2:
            yield Problem("branching", self.branching, "must be at least 2")
            return
        if not any(self.units) or min(self.units) < 0:
            yield Problem("units", self.units, "must not be negative, and at least one level needs some")
            return
        for name, size in (("units", self.num_rows), ("branching", self.num_clusters)):
            if size > MOST_LOCAL_ROWS:
                what = "hidden units" if name == "units" else "leaves"
                yield Problem(name, getattr(self, name), f"makes {size:,} {what}; ids have 31 bits", "use fewer levels")

    def build(self, info: BuildInfo) -> "HierarchicalMemoryMixer":
        return HierarchicalMemoryMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return 6 * d_model * (self.d_ff + self.fetched_units)

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 3 * d_model * self.fetched_units

    def inactive_params(self, d_model: int) -> int:
        return 3 * d_model * (self.num_rows - self.fetched_units)

    def rows(self, clusters: Any) -> Any:
        """Rows of the table that a document of each leaf id reads, (..., U); all -1 for an id below -1."""
        first, parts, depth = 0, [], len(self.units)
        for level, units in enumerate(self.units, 1):
            block = clusters // self.branching ** (depth - level)
            parts.append(first + block[..., None] * units + np.arange(units, dtype=np.int32))
            first += units * self.branching**level
        own = jnp.concatenate(parts, axis=-1)
        generic = first + np.arange(self.fetched_units, dtype=np.int32)
        known = (clusters >= 0) & (clusters < self.num_clusters)
        rows = jnp.where((clusters == GENERIC)[..., None], generic, jnp.where(known[..., None], own, -1))
        return rows.astype(jnp.int32)

    @classmethod
    def example(cls) -> tuple["HierarchicalMemory", BuildInfo]:
        config = cls(d_ff=24, units=(4, 0, 3), branching=3, max_runs=24)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class HierarchicalMemoryMixer(SwiGLUMixer):
    """A feed-forward layer, its parameters named as they are without memories, and a bank."""

    def __init__(self, memory: HierarchicalMemory, info: BuildInfo):
        super().__init__(SwiGLU(d_ff=memory.d_ff), info)
        self.memory = memory
        self.table = param((memory.num_rows, 3 * info.d_model), ("memory", None), _unit(info.d_model), group="table")

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        slots = min(self.memory.max_runs, x_BTD.shape[1] // ctx.rules.size("seq"))
        slot_BT, ids_BG = fetched.runs_of(ctx.rules, self._clusters(ctx), ctx.is_token, slots)
        units_BGU3, aux = ops.row_lookup(ctx.rules, self.table[...], self.memory.rows(ids_BG), return_waiting=True)
        units_BGU3 = save_point(units_BGU3.astype(x_BTD.dtype), "memory_out")
        y_BTD = super().__call__(x_BTD, ctx)[0] + fetched.swiglu_of_runs(ctx.rules, x_BTD, slot_BT, units_BGU3)
        if ctx.train:
            without = jnp.sum((slot_BT == slots) & ctx.is_token)
            aux = {**aux, "metric/tokens_without_memory": without.astype(jnp.float32)}
        return y_BTD, aux

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        """The fetched block of the document at hand, and its cluster."""
        units = jnp.zeros((batch, self.memory.fetched_units, self.table[...].shape[-1]), dtype)
        return {"units": units, "cluster": jnp.full((batch,), fetched.NONE, jnp.int32)}

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        """One token more is computed with the block at hand; blocks are fetched where the cluster changes."""
        last_B = jnp.where(ctx.is_token[:, -1], self._clusters(ctx)[:, -1], state["cluster"])
        new = {"units": self._units(last_B, state, ctx), "cluster": last_B}
        if x_BTD.shape[1] > 1:
            return self(x_BTD, ctx)[0], new
        gate, up, down = jnp.split(new["units"].astype(x_BTD.dtype), 3, axis=-1)
        hidden = jax.nn.silu(jnp.einsum("btd,bud->btu", x_BTD, gate)) * jnp.einsum("btd,bud->btu", x_BTD, up)
        return super().__call__(x_BTD, ctx)[0] + jnp.einsum("btu,bud->btd", hidden, down), new

    def _units(self, cluster_B, state, ctx):
        """(B, U, 3 D) blocks of these clusters; no table is read where they are those of the state."""

        def fetch(table):
            rows = self.memory.rows(cluster_B)[:, None]
            return ops.row_lookup(ctx.rules, table, rows)[:, 0].astype(state["units"].dtype)

        changed = jnp.any(cluster_B != state["cluster"])
        return jax.lax.cond(changed, fetch, lambda _: state["units"], self.table[...])

    def _clusters(self, ctx):
        found = ctx.rows.get(CLUSTERS)
        return jnp.full(ctx.token_ids.shape, GENERIC, jnp.int32) if found is None else found


def _unit(d_model: int) -> Init:
    """A hidden unit: gate and up as a feed-forward layer's, down zero."""

    def fn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        values = np.float32(d_model**-0.5) * rng.standard_normal(shape, np.float32)
        values[..., 2 * d_model :] = 0.0
        return values

    return Init(f"normal({d_model**-0.5:.4g}), down 0", fn)
