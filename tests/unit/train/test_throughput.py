"""FLOPs per token from documents as they lie in the rows, and nothing on a device whose peak is not known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.config.run import RunConfig, TrainConfig
from mlt.data.loader import DataConfig
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.count import count
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.train.repeat import copied, differences
from mlt.train.throughput import Utilization, memory_metrics, peak_flops, program_bytes

MIXERS = (Attention(num_heads=2, head_dim=16), SwiGLU(d_ff=32))
MODEL = LMConfig(d_model=32, vocab_size=272, stack=Stack(period=(Block(mixers=MIXERS),), repeats=2))
CONFIG = RunConfig(model=MODEL, data=DataConfig(sequence_length=64, batch_size=2), train=TrainConfig(steps=1))


def forward(length: int) -> float:
    return count(MODEL, MODEL.build(), length).flops_per_token


def test_model_flops_are_those_of_the_plan_for_whole_rows_and_less_for_packed_or_padded_ones():
    used = Utilization(CONFIG, device_kind="NVIDIA H100 80GB HBM3", num_devices=4)
    whole = np.ones((2, 64), np.int32)
    assert used.flops_per_token(whole) == pytest.approx(3 * forward(64))
    packed = np.concatenate([np.full(16, 1), np.full(40, 2), np.zeros(8)]).astype(np.int32)[None]
    assert used.flops_per_token(packed) == pytest.approx(3 * (16 * forward(16) + 40 * forward(40)) / 64)
    assert used.flops_per_token(packed) < used.flops_per_token(whole)
    assert used.metrics(1e6, whole) == {"throughput/mfu": pytest.approx(1e6 * 3 * forward(64) / (4 * 989e12))}


def test_an_unknown_device_has_no_utilization():
    assert Utilization(CONFIG, device_kind="cpu", num_devices=1).metrics(1e6, np.ones((2, 64), np.int32)) == {}
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12


def test_the_program_says_its_memory_where_the_device_does_not():
    compiled = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((256, 256), jnp.float32)).compile()
    needed = program_bytes(compiled)
    assert needed is not None
    assert needed >= 2 * 256 * 256 * 4
    known = jax.local_devices()[0].memory_stats()
    name = "memory/peak_bytes" if known else "memory/program_bytes"
    assert list(memory_metrics(needed)) == [name]


def test_a_copy_has_buffers_of_its_own_and_one_bit_is_found():
    tree = {"a": jnp.arange(6.0), "b": {"n": jnp.int32(3), "h": jnp.zeros(4, jnp.bfloat16)}}
    copy = copied(tree)
    assert copy["a"].unsafe_buffer_pointer() != tree["a"].unsafe_buffer_pointer()
    assert differences(tree, copy) == []
    copy["b"]["h"] = -copy["b"]["h"]  # equal as numbers
    copy["a"] = copy["a"].at[2].set(jnp.nextafter(jnp.float32(2), jnp.float32(3)))
    (line,) = differences(tree, copy)
    assert "a (1 of 6 values)" in line
    assert "b/h (4 of 4 values)" in line
    assert "b/n" not in line
