"""Parameters are described, then made: by name, whatever the mesh."""

import dataclasses
import tracemalloc

import jax
import numpy as np
from flax import nnx

from mlt.nn.linear import Linear
from mlt.nn.param import Buffer, buffer, fan_in, initialize, merge, named_leaves, normal, ones, param, partition, stack_specs
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules


class Two(nnx.Module):
    def __init__(self, width: int, extra: bool = False):
        self.first = Linear((("embed", width),), (("ffn", 2 * width),))
        self.second = Linear((("ffn", 2 * width),), (("embed", width),), bias=True)
        self.bias = buffer((width,), (None,), ones)
        self.extra = param((3,), (None,), normal(1.0)) if extra else None


def test_adding_a_parameter_leaves_the_others_as_they_were():
    plain, more = initialize(Two(8), 0), initialize(Two(8, extra=True), 0)
    values = dict(named_leaves(more))
    for name, leaf in named_leaves(plain):
        np.testing.assert_array_equal(values[name], leaf)
    assert not np.array_equal(plain.first.kernel[...].ravel(), plain.second.kernel[...].ravel())
    assert not np.array_equal(plain.first.kernel[...], initialize(Two(8), 1).first.kernel[...])


def test_every_mesh_starts_from_the_same_bits():
    specs = Two(8)
    rules = Rules(Layout(fsdp=4, tensor=2).build())
    spread = initialize(specs, 0, rules.param_shardings(specs))
    for (name, one), (_, many) in zip(named_leaves(initialize(specs, 0)), named_leaves(spread), strict=True):
        np.testing.assert_array_equal(one, many, err_msg=name)
    assert spread.first.kernel[...].addressable_shards[0].data.shape == (2, 8)


def test_stacked_layers_differ_from_each_other():
    stacked = initialize(stack_specs(Two(8), 3), 0)
    kernel = np.asarray(stacked.first.kernel[...])
    assert kernel.shape == (3, 8, 16)
    assert dict(named_leaves(stack_specs(Two(8), 3)))["first.kernel"].axes == ("layers", "embed", "ffn")
    assert not np.array_equal(kernel[0], kernel[1])


def test_partition_and_merge_undo_each_other():
    model = initialize(Two(8), 0)
    trained, buffers = partition(model)
    assert [name for name, _ in named_leaves(buffers)] == ["bias"]
    assert "bias" not in dict(named_leaves(trained))
    again = merge(trained, buffers)
    assert isinstance(again.bias, Buffer)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    for (_, a), (_, b) in zip(named_leaves(again), named_leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_initial_spread():
    wide = initialize(Linear((("embed", 400),), (("ffn", 300),), init=fan_in(400)), 0)
    assert abs(float(np.std(wide.kernel[...])) - 400**-0.5) < 0.01 * 400**-0.5


class Table(nnx.Module):
    def __init__(self, rows: int, width: int):
        self.table = param((rows, width), ("memory", None), normal(0.5), group="table")


def test_a_shard_of_a_table_is_drawn_alone():
    """Of 2 layers of 2^20 rows, one of 64 owners draws its own in a fraction of the memory, with the bits of the whole."""
    (spec,) = jax.tree.leaves(stack_specs(Table(2**20, 8), 2))
    tracemalloc.start()
    rows, own = {}, 2**20 // 64
    for shard in (0, 16, 63):
        rows[shard] = spec.make_rows(3, "table", shard * own, (shard + 1) * own)
    assert tracemalloc.get_traced_memory()[1] < spec.nbytes / 3
    tracemalloc.stop()
    whole = spec.make(3, "table")
    for shard, values in rows.items():
        np.testing.assert_array_equal(values, whole[:, shard * own : (shard + 1) * own])
    assert abs(whole.std() - 0.5) < 1e-3
    blocks = whole.reshape(2, 8, -1)
    assert len(np.unique(blocks[:, :, :2].round(6))) == 32, "a block repeats another"


def test_small_tables_are_drawn_like_other_parameters():
    described = Table(24, 6)
    plain = dataclasses.replace(described.table.get_value(), group="matrix")
    np.testing.assert_array_equal(described.table.get_value().make(5, "a"), plain.make(5, "a"))
    np.testing.assert_array_equal(described.table.get_value().stacked(3).make(5, "a"), plain.stacked(3).make(5, "a"))


def test_tables_on_a_mesh_have_the_bits_of_one_device():
    specs = stack_specs(Table(24, 6), 2)
    rules = Rules(Layout(replica=2, fsdp=4).build())
    spread = initialize(specs, 0, rules.param_shardings(specs)).table[...]
    assert spread.addressable_shards[0].data.shape == (2, 6, 6)
    np.testing.assert_array_equal(spread, initialize(specs, 0).table[...])
