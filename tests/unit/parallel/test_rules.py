"""Logical axes to mesh axes: collisions and sizes that do not divide are named."""

import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from mlt.errors import UserError
from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.parallel import Parallel
from mlt.nn.linear import Linear
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules


def rules(**degrees: int) -> Rules:
    return Rules(Layout(**degrees).abstract())


def test_specs():
    assert rules(fsdp=8).spec(("embed", "ffn")) == PartitionSpec("fsdp", "tensor")
    assert rules(fsdp=8).spec(("batch", "seq", "stream")) == PartitionSpec(("replica", "fsdp", "expert"), "context", None)


def test_two_dims_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="both map to mesh axis 'tensor'"):
        rules().spec(("heads", "ffn"))
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
        rules().spec(("width",))


def test_sizes_that_do_not_divide_are_all_listed():
    layer = Linear((("embed", 6),), (("ffn", 10),))
    with pytest.raises(UserError) as error:
        rules(fsdp=4, tensor=4).param_shardings(layer)
    message = str(error.value)
    assert "mesh.fsdp = 4: does not divide embed of 6 (kernel); use 1, 2, 3, 6, or sizes that are multiples of 4" in message
    assert "mesh.tensor = 4: does not divide ffn of 10 (kernel)" in message


def test_mesh_must_match_the_devices():
    with pytest.raises(UserError, match=r"fsdp=3 makes 3 devices, but 8 cpu"):
        Layout(fsdp=3).build()


@pytest.mark.parametrize(
    ("how", "carry", "attention"), [("permute", "permute", "heads"), ("zigzag", "gather", "zigzag"), ("ring", "ring", "ring")]
)
def test_a_layer_s_own_exchange_moves_only_what_it_names(how, carry, attention):
    """A layer of states and a window does not turn its attention into something by the name of a carry."""
    own = Layout(context=2, attention="heads").abstract_rules().exchanging(how)
    assert (own.carry, own.attention) == (carry, attention)


def test_each_layer_beside_others_crosses_shards_in_its_own_way():
    layers = (Attention(num_heads=2, head_dim=8, exchange="gather"), Mamba2(num_heads=2, head_dim=8, state_dim=8))
    mixer = Parallel(mixers=layers, exchange="ring").build(BuildInfo(d_model=16, num_sub_layers=1, vocab_size=8))
    seen = []

    class Recorded:
        def call_and_publish(self, x, ctx):
            seen.append((ctx.rules.carry, ctx.rules.attention))
            return x, {}, {}

    mixer.mixers = [Recorded(), Recorded()]
    layout = Layout(context=2, attention="heads", carry="permute").abstract_rules()
    mixer(jnp.zeros(()), Context(None, None, None, layout, train=True))
    assert seen == [("gather", "gather"), ("permute", "heads")]
