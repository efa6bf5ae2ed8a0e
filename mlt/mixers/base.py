"""The contracts of mixers: what a config must say, what a module must do, what both may know of the call.

A *sequence mixer* moves information along the sequence. A *channel mixer* does not, or only through a declared left
context. Each mixer is one file; its config class names, validates and builds it.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mlt.config.base import Config
from mlt.nn.param import ParamSpec
from mlt.parallel.rules import Rules

Aux = dict[str, jax.Array]
"""Small facts about one call. Keys say how to reduce them over micro-batches and what they are for:
`loss/x` is added to the training loss, `metric/x` is averaged and logged, `count/x` (per expert, or one number) is summed."""

Arrays = dict[str, jax.Array]
"""One published value: arrays by the names of its parts."""

EMBEDDING = "embedding"
"""The name under which every stack publishes the stream that enters it, as `{"stream": (B, T, D)}`."""

Kernel = str | tuple[str, ...] | None
"""Backends of an op as a config names them: None takes the best available, a name is strict, several are tried in order."""

CLUSTERS = "clusters"
"""Name in `Context.rows` of the cluster of each token's document, (B, T) int32; -1 where it has none."""

SAVE_POINTS = (
    "sub_layer_in",
    "mixer_out",
    "attention_qkv",
    "attention_out",
    "recurrence_in",
    "recurrence_out",
    "ffn_hidden",
    "expert_in",
    "expert_hidden",
    "memory_out",
    "published",
)
"""The closed list of tensors that a memory policy may name (`model/remat.py`)."""


def save_point(x: jax.Array, name: str) -> jax.Array:
    """Name a tensor so that the memory policy can save, offload or recompute it."""
    if name not in SAVE_POINTS:
        raise ValueError(f"save point {name!r} is not one of {SAVE_POINTS}")
    return checkpoint_name(x, name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every mixer may know about the tokens it is given.

    Attributes:
        token_ids: (B, T) int32.
        segment_ids: (B, T) int32, document index inside the row; 0 is padding.
        positions: (B, T) int32, restarting at 0 with each segment.
        rules: where arrays live on the mesh.
        train: False turns off everything that only training wants.
        published: what earlier layers published, by name; a mixer gets the names that its config reads.
        shared: modules whose parameters several layers use, by name; a mixer gets the names that its config shares.
        rows: table rows that the data pipeline has found for these tokens, by the layer's name, (B, T, S) int32 or
            `WideRows`; a layer whose name is not there hashes for itself. Under `CLUSTERS`, the documents' clusters.
    """

    token_ids: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    rules: Rules = dataclasses.field(metadata={"static": True})
    train: bool = dataclasses.field(metadata={"static": True})
    published: Mapping[str, "Arrays"] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_token(self) -> jax.Array:
        """(B, T) bool: False at padding."""
        return self.segment_ids != 0


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of a published value, as a whole row has it.

    Attributes:
        shape: sizes behind (B, T).
        axes: logical axis of each.
        form: what else readers must agree on, in words: how keys are rotated.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    form: str = ""


Published = dict[str, Part]
"""What one published value consists of."""


@dataclasses.dataclass(frozen=True)
class BuildInfo:
    """What a mixer may know of the model around it.

    Attributes:
        d_model: width of the residual stream.
        num_sub_layers: residual additions in the whole model; output projections scale by its inverse square root.
        vocab_size: size of the token embedding.
        token_strings: raw vocabulary entry of each token id, for mixers that compress token ids; None if unknown.
    """

    d_model: int
    num_sub_layers: int
    vocab_size: int
    token_strings: tuple[str, ...] | None = None

    @property
    def residual_scale(self) -> float:
        return max(self.num_sub_layers, 1) ** -0.5


def exchanging(ctx: Context, how: str | None) -> Context:
    """The context of a layer that crosses sequence shards in a way of its own, as its config's `exchange` says."""
    return ctx if how is None else dataclasses.replace(ctx, rules=ctx.rules.exchanging(how))


class Mixer(nnx.Module):
    """A built mixer: a plain tree of parameters and a pure call."""

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        raise NotImplementedError

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        """Decoding state before the first token: a tree of arrays of fixed shapes. Empty for stateless mixers."""
        return {}

    def step(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        """Continue from `state` with T more tokens; (y, state). T > 1 is a prefill. Stateless mixers just call."""
        return self(x_BTD, ctx)[0], state

    def call_and_publish(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux, dict[str, Arrays]]:
        """The call, and the values that its config says it publishes. Mixers that publish override it."""
        return *self(x_BTD, ctx), {}

    def step_and_publish(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any, dict[str, Arrays]]:
        """The step, and what it publishes: values of these T tokens, or whatever readers agree on with the publisher."""
        return *self.step(x_BTD, state, ctx), {}

    def updated(self, aux: Mapping[str, jax.Array]) -> "Mixer":
        """This mixer with its buffers moved on after an optimizer step, given the step's summed aux."""
        return self

    def within_step(self, aux: Mapping[str, jax.Array]) -> "Mixer":
        """This mixer for the next micro-batch of a step, given the aux summed over those before it; nothing of it is kept.

        Layers of a period come stacked, and so does their aux.
        """
        return self


class AroundMemory(Mixer):
    """A mixer around another one, `memory`, whose aux is its own: what moves with it moves."""

    memory: Mixer

    def updated(self, aux: Mapping[str, jax.Array]) -> "AroundMemory":
        return self._around(self.memory.updated(aux))

    def within_step(self, aux: Mapping[str, jax.Array]) -> "AroundMemory":
        return self._around(self.memory.within_step(aux))

    def _around(self, memory: Mixer) -> "AroundMemory":
        new = jax.tree.map(lambda leaf: leaf, self)
        new.memory = memory
        return new


class MixerConfig(Config):
    """Names, validates and builds a mixer."""

    op: ClassVar[str | None] = None
    """The op whose backend `kernel` names, for mixers that have such a field."""

    pre_norm: ClassVar[bool] = True
    """Whether the block normalizes the stream before the mixer; False where the mixer norms its own input."""

    replaces: ClassVar[bool] = False
    """Whether the output takes the place of the stream instead of being added to it."""

    @abstractmethod
    def build(self, info: BuildInfo) -> Mixer:
        """The mixer as a tree of described parameters (`ParamSpec` leaves); no memory is spent."""

    @abstractmethod
    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        """Forward FLOPs (a multiply-add is 2) per token, averaged over a sequence of `seq_len` tokens."""

    @abstractmethod
    def state_size(self, d_model: int, seq_len: int) -> int:
        """Values kept per sequence while decoding after `seq_len` tokens."""

    def publishes(self, d_model: int) -> Mapping[str, Published]:
        """Values that later layers may read, by name."""
        return {}

    def reads(self, d_model: int) -> Mapping[str, Published]:
        """Values of earlier layers that the mixer reads, by name, and what it takes them to consist of."""
        return {}

    def shares(self) -> Mapping[str, Config]:
        """Parts whose parameters every layer that names them uses: kept, counted and drawn once, by name. A part is a config
        with a `build(info)`; its module holds no buffers. The costs of using it, and the state of the use, are the mixer's.
        """
        return {}

    def inactive_params(self, d_model: int) -> int:
        """Trained values that one token's forward pass does not touch: experts and table rows left out.

        The rows of a shared table all count as untouched, once; a mixer takes those off that it reads.
        """
        return 0

    @property
    def num_branches(self) -> int:
        """Residual streams that the mixer reads and writes each on its own, x and y being (B, T, M, D) then; 1 for a mixer of
        one stream, which a stack of several lets read a mixture of them (`model/streams.py`)."""
        return 1

    @property
    def float8_tables(self) -> tuple[str, ...]:
        """Parameters whose rows are read as 8 bits hold them (`nn/float8.py`), and which are exported so."""
        return ()

    @property
    def num_clusters(self) -> int:
        """Clusters of documents whose ids the mixer reads from the batch (`Context.rows["clusters"]`); 0 where it reads none."""
        return 0

    @property
    def cluster_runs(self) -> int:
        """Stretches of one cluster that a row may then have."""
        return 0

    def param_count(self, info: BuildInfo) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.build(info)) if isinstance(leaf, ParamSpec) and leaf.trainable)

    @classmethod
    @abstractmethod
    def example(cls) -> tuple["MixerConfig", BuildInfo]:
        """A small instance and a width to build it for; the conformance suite runs every test on it."""

    @classmethod
    def example_publishers(cls) -> tuple["MixerConfig", ...]:
        """Layers to put in front of the example, which publish what it reads."""
        return ()


class SequenceMixerConfig(MixerConfig):
    """Config of a mixer that moves information along the sequence.

    Attributes:
        kernel: backend of its op; None takes the best available, a name is strict, several are tried in order.
        exchange: how this layer crosses sequence shards, in place of the layout's choice (`mesh.carry`, `mesh.attention`).
    """

    context: ClassVar[str]
    """What crosses shards of a sequence: `ring` (keys and values, `parallel/ring.py`), `carry` (a state that is linear in
    the one before, `parallel/carry.py`), `halo` (a few inputs), or `none`: whole sequences only."""

    kernel: Kernel = None
    exchange: str | None = None

    def whole_rows(self) -> str | None:
        """What to change where a setting of this mixer needs whole sequences, which its class does not; None where none does."""
        return None


class ChannelMixerConfig(MixerConfig):
    """Config of a mixer that works token by token, or with a short fixed left context."""

    @property
    def left_context(self) -> int:
        """Tokens to the left that an output may depend on."""
        return 0


def shared_axis(count: int) -> str | None:
    """Logical axis of key and value heads or groups; a single one is shared by all tensor shards."""
    return "kv_heads" if count > 1 else None


def resume_segment(state_segment_B: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """(B,) bool: whether the first new token goes on with the document that the decoding state stopped in."""
    return state_segment_B == segment_ids_BT[:, 0]


def keep_where(keep_B: jax.Array, value: jax.Array) -> jax.Array:
    """Zero the rows of a decoding state whose document has ended."""
    return jnp.where(keep_B.reshape(-1, *([1] * (value.ndim - 1))), value, jnp.zeros((), value.dtype))
