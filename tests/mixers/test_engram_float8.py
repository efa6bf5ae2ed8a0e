"""Engram with rows in 8 bits: the layer of the rounded table, in values, gradients and exports, to the bit."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from mlt_kernels.testing import assert_same_bits, positions, segment_ids
from safetensors.numpy import save_file

from mlt.config.problems import collect_problems
from mlt.export.names import from_tensors, to_tensors
from mlt.export.safetensors import read_tensors
from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.channel.engram import Engram
from mlt.model.block import Block
from mlt.model.float8_tables import float8_names, held_in_8_bits
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.float8 import restored, stored, stored_bytes
from mlt.nn.param import initialize, named_leaves
from mlt.parallel.rules import Rules
from mlt.verify.material import lively

D = 16
PLAIN = Engram(layer_id=0, layer_ids=(0,), rows_per_head=40, head_dim=32, heads_per_order=1, compress_tokens=False)
ROUNDED = PLAIN.replace(rows_in="float8")


def inputs() -> tuple[jax.Array, Context]:
    rng, segments = np.random.default_rng(0), segment_ids(0, 2, 24)
    ids = rng.integers(0, 64, segments.shape).astype(np.int32)
    ctx = Context(jnp.asarray(ids), jnp.asarray(segments), jnp.asarray(positions(segments)), Rules(), True)
    return jnp.asarray(rng.standard_normal((2, 24, D)), jnp.float32), ctx


@jax.jit
def outcome(mixer, x, ctx):
    """(y, gradient of the mean square by the table)."""

    def total(table):
        own = jax.tree.map(lambda leaf: leaf, mixer)
        own.table = own.table.replace(table)
        y = own(x, ctx)[0]
        return jnp.mean(y**2), y

    gradient, y = jax.grad(total, has_aux=True)(mixer.table[...])
    return y, gradient


def test_the_layer_is_that_of_the_rounded_table():
    x, ctx = inputs()
    rounding, plain = (lively(initialize(c.build(BuildInfo(D, 4, 64)), 0), 1) for c in (ROUNDED, PLAIN))
    table = restored(*stored(np.asarray(plain.table[...])))
    assert (table != plain.table[...]).mean() > 0.8
    plain.table = plain.table.replace(jnp.asarray(table))
    (y, slope), (want, want_slope) = outcome(rounding, x, ctx), outcome(plain, x, ctx)
    assert_same_bits(y, want)
    assert_same_bits(slope, want_slope)
    assert np.abs(slope).max() > 0


def test_exports_hold_8_bits_and_compute_the_same(tmp_path):
    stack = Stack(head=(Block(mixers=(ROUNDED,)),), period=(Block(mixers=(ROUNDED,)),), repeats=2, tail=(Block(mixers=(PLAIN,)),))
    config, ctx = LMConfig(d_model=D, vocab_size=64, stack=stack), inputs()[1]
    specs = config.build()
    model = lively(initialize(specs, 0), 1)
    assert float8_names(config) == {f"stack.{part}.0.sub_layers.0.mixer.table" for part in ("head", "period")}
    tensors = to_tensors(config, model)
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_tensors(tmp_path / "model.safetensors")
    assert {name: (a.dtype, a.shape) for name, a in found.items()} == {n: (a.dtype, a.shape) for n, a in tensors.items()}
    rows = (1024, 32)
    for layer, dtype in enumerate((ml_dtypes.float8_e4m3fn,) * 3 + (np.float32,)):
        table = found[f"layers.{layer}.sub_layers.0.mixer.table"]
        assert (table.dtype, table.shape) == (dtype, rows)
        scale = found.get(f"layers.{layer}.sub_layers.0.mixer.table_scale")
        assert scale is None if layer == 3 else (scale.dtype, scale.shape) == (ml_dtypes.float8_e8m0fnu, (1024, 1))
    again = from_tensors(config, specs, found)
    names = lambda model: [(name, leaf.shape, leaf.dtype) for name, leaf in named_leaves(model)]  # noqa: E731
    assert names(again) == names(model)
    run = jax.jit(functools.partial(_logits, ctx=ctx))
    assert_same_bits(run(again), run(model))
    small = held_in_8_bits(model)
    assert_same_bits(jax.jit(functools.partial(_logits, ctx=ctx))(small), run(model))
    sizes = [sum(leaf.nbytes for _, leaf in named_leaves(m)) for m in (model, small)]
    assert sizes[0] - sizes[1] == 3 * (4 * 1024 * 32 - stored_bytes(1024, 32))


def _logits(model, ctx):
    return model.logits(model(ctx, dtype=jnp.dtype("float32"), remat=Remat(mode="none"))[0])


def test_problems():
    assert [p.path for p in collect_problems(ROUNDED.replace(head_dim=24))] == ["head_dim"]
    assert not collect_problems(ROUNDED)
