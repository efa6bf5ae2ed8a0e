"""Engram (arXiv 2601.07372): a table addressed by the last few tokens, gated by the residual stream."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mlt.config.problems import Problem
from mlt.mixers.base import Aux, BuildInfo, ChannelMixerConfig, Context, Kernel, Mixer, keep_where, resume_segment, save_point
from mlt.mixers.conv import CausalConv
from mlt.mixers.token_map import map_buffer, token_map
from mlt.nn.float8 import GROUP, Rows8, rounded
from mlt.nn.linear import Linear
from mlt.nn.ngram_hash import NgramHash, NgramTables, multipliers, ngram_rows, ngram_tables, split_words
from mlt.nn.norm import RMSNorm
from mlt.nn.param import Init, buffer, fan_in, given, normal, param, zeros
from mlt.parallel import ops
from mlt.parallel.table import MOST_LOCAL_ROWS, WideRows

ROW_MULTIPLE = 1024
"""The flat table is padded to a multiple of this many rows, so that it splits over any likely number of devices."""

MOST_ROWS = 2**62
CONV_WIDTH = 4
GATE_FLOOR = 1e-6


class Engram(ChannelMixerConfig):
    """y = silu(conv(norm(u))) + u with u_t = sigmoid(root(<norm(h_t), norm(W_K e_t)> / sqrt(D))) W_V e_t.

    e_t joins the rows that hashes of the last 2, ..., max_ngram tokens point to, several heads for each order, and
    root(s) = sign(s) sqrt(|s|). It goes first in a block: the sub-layer's input is the stream h itself.

    In a stack of M residual streams it may take all of them (`branches`): each has a W_K, norms, a gate and, through the
    convolution, an output of its own, which is added to it; table and W_V are shared.

    Attributes:
        layer_id: which Engram layer of the model this one is.
        layer_ids: all Engram layers of the model, in order: no two of their tables share a size.
        rows_per_head: each head's table has the next unused prime of at least this many rows.
        head_dim: width of a row.
        max_ngram: longest n-gram.
        heads_per_order: tables per n-gram order.
        branches: residual streams that are read and written one by one (M), all that the stack has; 1 takes what any
            sub-layer takes, the stream or a mixture of streams.
        fused_projection: keep the W_K of all branches and then W_V as one matrix: the same function, one parameter.
        conv: the depthwise convolution of width 4 and dilation max_ngram; it starts at zero.
        compress_tokens: let tokens share an id that differ in case, accents or white space only.
        pad_token_id: read where an n-gram reaches over its document's start.
        cross_document: let n-grams and convolution read on across packed documents, as the published demo does.
        seed: of the hash multipliers.
        hash_on: "host" lets the loader's threads compute the rows of a training batch, bit for bit those that the program
            computes; wherever a batch brings none (evaluation, decoding, proofs) the program does, as it always does under
            "device".
        table_on: "host" keeps the table and its optimizer's state in host memory in training, and only the rows of a batch on
            the devices (docs/tables.md); it needs hash_on="host". Evaluation and decoding of a checkpoint read it whole.
        rows_in: "float8" reads rows as 8 bits hold them (`nn/float8.py`), and exports keep them so. In training the owner's
            rows are float32 and each lookup rounds what it reads; the gradient goes to the float32 row as if it had not.
        kernel: backend of the row lookup; None takes the best available, a name is strict, several are tried in order.
    """

    op: ClassVar[str] = "row_lookup"
    pre_norm: ClassVar[bool] = False

    layer_id: int
    layer_ids: tuple[int, ...]
    rows_per_head: int
    head_dim: int
    max_ngram: int = 3
    heads_per_order: int = 8
    branches: int = 1
    fused_projection: bool = False
    conv: bool = True
    compress_tokens: bool = True
    pad_token_id: int = 0
    cross_document: bool = False
    seed: int = 0
    hash_on: Literal["device", "host"] = "device"
    table_on: Literal["device", "host"] = "device"
    rows_in: Literal["float32", "float8"] = "float32"
    kernel: Kernel = None

    @classmethod
    def as_in_paper(cls, layer_id: int, layer_ids: tuple[int, ...], **fields: Any) -> "Engram":
        """The layer of Engram-27B: orders 2 and 3, eight heads of width 80 each, with the convolution.

        Engram-40B has rows_per_head = 7,239,680. The model has four residual streams, branches = 4.
        """
        given = {"rows_per_head": 2_262_400, "head_dim": 80, "max_ngram": 3, "heads_per_order": 8, "conv": True}
        return cls(layer_id=layer_id, layer_ids=layer_ids, **{**given, **fields})

    @classmethod
    def as_in_v4_1(cls, layer_id: int, layer_ids: tuple[int, ...], **fields: Any) -> "Engram":
        """The layer of the released DeepSeek-V4.1: orders 2 to 4, eight heads of width 256 each, one projection, no convolution.

        Rows are kept in 8 bits. The model has four residual streams, branches = 4.
        n-grams end at their document's start, as always here unless `cross_document` is set.
        """
        given: dict[str, Any] = {"rows_per_head": 16_000_000, "head_dim": 256, "max_ngram": 4, "heads_per_order": 8}
        given |= {"fused_projection": True, "conv": False, "rows_in": "float8"}
        return cls(layer_id=layer_id, layer_ids=layer_ids, **{**given, **fields})

    @property
    def name(self) -> str:
        """What rows of this layer are called in a batch."""
        return f"engram_{self.layer_id}"

    @property
    def num_tables(self) -> int:
        """Tables of this layer (S): one per order and head."""
        return (self.max_ngram - 1) * self.heads_per_order

    @property
    def d_memory(self) -> int:
        """Width of the rows of a token joined together."""
        return self.num_tables * self.head_dim

    @property
    def tables(self) -> NgramTables:
        bases = (self.rows_per_head,) * (self.max_ngram - 1)
        return ngram_tables(self.layer_ids, bases, self.heads_per_order)[self.layer_id]

    @property
    def num_branches(self) -> int:
        return self.branches

    @property
    def left_context(self) -> int:
        return self.max_ngram - 1 + self._conv_context

    @property
    def _conv_context(self) -> int:
        return (CONV_WIDTH - 1) * self.max_ngram if self.conv else 0

    def problems(self) -> Iterator[Problem]:
        for name in ("rows_per_head", "head_dim", "heads_per_order", "branches"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")
                return
        for name in ("pad_token_id", "seed"):
            if getattr(self, name) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")
        if self.rows_in == "float8" and self.head_dim % GROUP:
            rule = f"must be a multiple of {GROUP} with rows_in='float8': so many values share a scale"
            yield Problem("head_dim", self.head_dim, rule, "use such a width, or rows_in='float32'")
        if self.max_ngram < 2:
            yield Problem("max_ngram", self.max_ngram, "must be at least 2")
            return
        if len(set(self.layer_ids)) < len(self.layer_ids) or min(self.layer_ids, default=0) < 0:
            yield Problem("layer_ids", self.layer_ids, "must be distinct and not negative")
            return
        if self.layer_id not in self.layer_ids:
            ways_out = "list every Engram layer of the model there, this one too"
            yield Problem("layer_id", self.layer_id, f"must be one of layer_ids = {self.layer_ids}", ways_out)
            return
        if self.table_on == "host" and self.hash_on != "host":
            rule = "is there only where rows are known before the step"
            yield Problem("table_on", self.table_on, rule, "set hash_on='host' too")
        if self.num_tables * self.rows_per_head >= MOST_ROWS:
            rows = f"makes about {self.num_tables * self.rows_per_head} rows in {self.num_tables} tables"
            ways_out = f"use at most {MOST_ROWS // self.num_tables}"
            yield Problem("rows_per_head", self.rows_per_head, f"{rows}; row ids have 63 bits", ways_out)

    @property
    def float8_tables(self) -> tuple[str, ...]:
        return ("table",) if self.rows_in == "float8" else ()

    def build(self, info: BuildInfo) -> "EngramMixer":
        return EngramMixer(self, info)

    def ngram_hash(self, info: BuildInfo) -> NgramHash:
        """The layer's hash on the host.

        Raises:
            UserError: the tokenizer does not fit the compression or the vocabulary.
        """
        token_map_V = token_map(info, self.pad_token_id, compress=self.compress_tokens)
        num_compressed = info.vocab_size if token_map_V is None else int(token_map_V.max()) + 1
        words_N2 = split_words(multipliers(num_compressed, self.max_ngram, self.layer_id, self.seed))
        return NgramHash(self.tables, words_N2, token_map_V, self.pad_token_id, self.cross_document)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        projections = 2 * self.d_memory * d_model * (self.branches + 1)
        return projections + (2 * CONV_WIDTH * d_model * self.branches if self.conv else 0)

    def state_size(self, d_model: int, seq_len: int) -> int:
        return self._conv_context * d_model * self.branches

    def inactive_params(self, d_model: int) -> int:
        return self.head_dim * (_padded(self.tables.num_rows) - self.num_tables)

    @classmethod
    def example(cls) -> tuple["Engram", BuildInfo]:
        words = tuple(space + word for word in ("a", "A", "b", "B", "c", "d", "e", "f") for space in ("", " ", "\n"))
        config = cls(layer_id=4, layer_ids=(1, 4), rows_per_head=50, head_dim=4, heads_per_order=2)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=32, token_strings=words)


class EngramMixer(Mixer):
    def __init__(self, config: Engram, info: BuildInfo):
        self.config = config
        self.tables = config.tables
        d, s, h, m = info.d_model, config.num_tables, config.head_dim, config.branches
        own = config.ngram_hash(info)
        self.token_map = None if own.token_map_V is None else map_buffer(own.token_map_V)
        self.multipliers = buffer(own.words_N2.shape, (None, None), given(own.words_N2, "hash multipliers"), dtype="uint32")
        self.table = param((_padded(self.tables.num_rows), h), ("memory", None), normal(0.02), group="table")
        rows, stream = (("heads", s), ("head_dim", h)), (("embed", d),)
        keys, fused = (stream if m == 1 else (("branches", m), *stream)), config.fused_projection
        self.key: Any = None if fused else Linear(rows, keys)
        self.value: Any = None if fused else Linear(rows, stream, init=fan_in(s * h, scale=info.residual_scale))
        joined = (("branches", m + 1), *stream)
        self.projection = Linear(rows, joined, init=_joined(s * h, info.residual_scale)) if fused else None
        self.query_norm = RMSNorm(d, branches=m)
        self.key_norm = RMSNorm(d, branches=m)
        self.conv_norm = RMSNorm(d, eps=1e-5, branches=m) if config.conv else None
        self.conv = CausalConv(keys, width=CONV_WIDTH, dilation=config.max_ngram, init=zeros) if config.conv else None

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        """x and the result are (B, T, D), with several branches (B, T, M, D)."""
        gated, aux = self._gated(x, self._rows_over(ctx), ctx)
        if self.conv is None or self.conv_norm is None:
            return gated, aux
        return gated + self.conv(self.conv_norm(gated), ctx, segment_ids_BT=self._conv_segments(ctx.segment_ids)), aux

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        """Compressed ids of the last max_ngram - 1 tokens (-1 where there is none), their segment, the conv's halo."""
        ids = jnp.full((batch, self.config.max_ngram - 1), -1, jnp.int32)
        state = {"ids": ids, "segment": jnp.zeros((batch,), jnp.int32)}
        return state if self.conv is None else {**state, "halo": self.conv.init_state(batch, dtype)}

    def step(self, x: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        past = self.config.max_ngram - 1
        keep = resume_segment(state["segment"], ctx.segment_ids) | self.config.cross_document
        ids = jnp.concatenate([state["ids"], self.compressed(ctx.token_ids)], axis=1)
        # The past goes under the first new token's segment where it is the same document, else under none.
        past_segment = jnp.where(keep, ctx.segment_ids[:, 0], 0)[:, None]
        segments = jnp.concatenate([jnp.broadcast_to(past_segment, state["ids"].shape), ctx.segment_ids], axis=1)
        rows_BTS = jax.tree.map(lambda words: words[:, past:], self.rows(ids, segments))
        gated, _ = self._gated(x, rows_BTS, ctx)
        ends = (segments[:, -past:] == segments[:, -1:]) | self.config.cross_document
        new = {"ids": jnp.where(ends, ids[:, -past:], -1), "segment": ctx.segment_ids[:, -1]}
        if self.conv is None or self.conv_norm is None:
            return gated, new
        halo = keep_where(keep, state["halo"])
        mixed, new["halo"] = self.conv.step(self.conv_norm(gated), self._conv_segments(ctx.segment_ids), halo)
        return gated + mixed, new

    def compressed(self, token_ids_BT: jax.Array) -> jax.Array:
        """Compressed token ids; a negative id is no token and stays negative."""
        if self.token_map is None:
            return token_ids_BT
        return jnp.where(token_ids_BT < 0, token_ids_BT, self.token_map[...][jnp.maximum(token_ids_BT, 0)])

    def rows(self, compressed_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array | WideRows:
        """Rows of the table that each token reads, (B, T, S); -1 for none. They depend on token ids alone."""
        return self._hash(compressed_BT, segment_ids_BT, self.multipliers[...], self._pad_id())

    def _rows_over(self, ctx: Context) -> jax.Array | WideRows:
        """`rows` of the call's tokens; a sequence shard gets the few token ids in front of it."""
        if self.config.hash_on == "host" and self.config.name in ctx.rows:
            return ctx.rows[self.config.name]
        held = self.table[...].shape[-2]
        if held < self.tables.num_rows:
            raise ValueError(f"{self.config.name}: {held} rows of the table are here, and the batch does not say which")

        def run(numbers_BT, segment_ids_BT, words_N2, pad_id):
            return self._hash(numbers_BT - 1, segment_ids_BT, words_N2, pad_id)

        # Zeros stand in front of a row: counted from one, they are no token.
        arrays = (self.compressed(ctx.token_ids) + 1, ctx.segment_ids)
        others = (self.multipliers[...], jnp.asarray(self._pad_id(), jnp.int32))
        axes = ("batch", "seq", None)
        output = axes if self.tables.num_rows <= MOST_LOCAL_ROWS else WideRows(axes, axes)
        return ops.with_left_context(run, ctx.rules, self.config.max_ngram - 1, arrays, others, output)

    def _pad_id(self) -> jax.Array | int:
        pad = self.config.pad_token_id
        return pad if self.token_map is None else self.token_map[...][pad]

    def _hash(self, ids_BT, segment_ids_BT, words_N2, pad_id):
        crossing = self.config.cross_document
        rows = ngram_rows(ids_BT, segment_ids_BT, words_N2, self.tables, pad_id=pad_id, cross_document=crossing)
        return WideRows(*rows) if isinstance(rows, tuple) else rows

    def _gated(self, x, rows_BTS, ctx):
        e_BTSH, aux = self._looked_up(rows_BTS, ctx)
        e_BTSH = save_point(e_BTSH.astype(x.dtype), "memory_out")
        key, value_BTD = self._projected(e_BTSH)
        query, key = self.query_norm(x.astype(jnp.float32)), self.key_norm(key.astype(jnp.float32))
        score = (query * key).sum(-1, keepdims=True) * x.shape[-1] ** -0.5
        root = jnp.sign(score) * jnp.sqrt(jnp.maximum(jnp.abs(score), GATE_FLOOR))
        value = value_BTD if self.config.branches == 1 else value_BTD[..., None, :]
        return (jax.nn.sigmoid(root) * value).astype(x.dtype), aux

    def _looked_up(self, rows_BTS, ctx):
        table = self.table[...]
        if isinstance(table, Rows8):
            return table.read(rows_BTS), {}
        options = {"return_waiting": True, "implementation": self.config.kernel}
        e_BTSH, aux = ops.row_lookup(ctx.rules, table, rows_BTS, **options)
        return (rounded(e_BTSH) if self.config.rows_in == "float8" else e_BTSH), aux

    def _projected(self, e_BTSH):
        """Keys in the shape of the streams, and the value (B, T, D)."""
        if self.projection is None:
            return self.key(e_BTSH), self.value(e_BTSH)
        made = self.projection(e_BTSH)
        keys = made[..., 0, :] if self.config.branches == 1 else made[..., :-1, :]
        return keys, made[..., -1, :]

    def _conv_segments(self, segment_ids_BT):
        return jnp.ones_like(segment_ids_BT) if self.config.cross_document else segment_ids_BT


def _joined(size: int, value_scale: float) -> Init:
    """Keys and, last, the value, each as it is drawn on its own."""

    def fn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        drawn = np.float32(size**-0.5) * rng.standard_normal(shape, np.float32)
        drawn[..., -1, :] *= np.float32(value_scale)
        return drawn

    return Init(f"normal({size**-0.5:.4g}), the value's times {value_scale:.4g}", fn)


def _padded(num_rows: int) -> int:
    return -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE
