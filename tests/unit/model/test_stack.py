"""The stack: layers in depth order, one program per period, and memory policies that change no gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.config.problems import collect_problems
from mlt.mixers.base import SAVE_POINTS, Context
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.short_conv import ShortConv
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import initialize, named_leaves
from mlt.parallel.rules import Rules
from mlt.verify.material import lively, packed_rows

CONV, ATTENTION = Block(mixers=(ShortConv(), SwiGLU(d_ff=24))), Block(mixers=(Attention(num_heads=2, head_dim=8),))
STACK = Stack(head=(CONV,), period=(ATTENTION, CONV), repeats=3, tail=(ATTENTION,))
CONFIG = LMConfig(d_model=16, vocab_size=32, stack=STACK)
SHALLOW = CONFIG.replace(stack=Stack(period=(Block(mixers=(Attention(num_heads=2, head_dim=8), SwiGLU(d_ff=24))),), repeats=2))


@functools.cache
def model(config: LMConfig = CONFIG):
    return lively(initialize(config.build(), 0), 1)


def forward(model, batch, remat):
    ctx = Context(batch["tokens"], batch["segment_ids"], batch["positions"], Rules(None), True)
    return model.logits(model(ctx, dtype=jnp.dtype("float32"), remat=remat)[0])


@functools.cache
def rows():
    return packed_rows(np.random.default_rng(0), rows=2, length=24, num_ids=32)


def test_layers_in_depth_order():
    assert STACK.num_layers == 8
    kinds = [type(block.mixers[0]).__name__ for block in STACK.layers()]
    assert kinds == ["ShortConv", *["Attention", "ShortConv"] * 3, "Attention"]


def test_scanned_periods_equal_unrolled_blocks():
    unrolled_config = CONFIG.replace(stack=Stack(head=tuple(STACK.layers())))
    unrolled = initialize(unrolled_config.build(), 5)
    scanned = model()
    for index in range(8):
        if index in (0, 7):
            source = scanned.stack.head[0] if index == 0 else scanned.stack.tail[0]
        else:
            repeat, place = divmod(index - 1, 2)
            source = jax.tree.map(lambda leaf, r=repeat: leaf[r], scanned.stack.period[place])
        unrolled.stack.head[index] = source
    unrolled.embed, unrolled.norm, unrolled.head = scanned.embed, scanned.norm, scanned.head
    a, b = (forward(m, rows(), Remat(mode="none")) for m in (scanned, unrolled))
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(a).max())


def test_the_program_does_not_grow_with_depth():
    def size(repeats: int) -> int:
        config = CONFIG.replace(stack=STACK.replace(repeats=repeats))
        return len(jax.jit(forward, static_argnums=2).lower(model(config), rows(), Remat()).as_text())

    assert size(12) < 1.05 * size(3)


POLICIES = {
    "none": Remat(mode="none"),
    "recompute": Remat(),
    "save": Remat(save=("attention_out", "ffn_hidden")),
    "offload": Remat(save=("ffn_hidden",), offload=("attention_qkv", "sub_layer_in")),
}


def gradient(remat: Remat):
    return jax.grad(lambda m: jnp.sum(jnp.sin(forward(m, rows(), remat))))


@pytest.mark.parametrize("name", ["recompute", "save", "offload"])
def test_memory_policies_change_no_gradient(name):
    expected = jax.jit(gradient(POLICIES["none"]))(model(SHALLOW))
    found = jax.jit(gradient(POLICIES[name]))(model(SHALLOW))
    for (key, a), (_, b) in zip(named_leaves(expected), named_leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * (np.abs(a).max() + 1e-6), err_msg=key)


def test_offloaded_tensors_go_to_host_and_come_back():
    def transfers(remat: Remat) -> int:
        text = str(jax.make_jaxpr(gradient(remat))(model(SHALLOW)))
        return text.count("device_put[")

    assert transfers(POLICIES["recompute"]) == 0
    # q, k and v go out and come back.
    assert transfers(Remat(offload=("attention_qkv",))) == 6


def test_recomputing_keeps_less():
    def kept(remat: Remat) -> int:
        # Residuals of the scan: what the forward pass hands to the backward pass.
        _, pull = jax.vjp(lambda m: jnp.sum(forward(m, rows(), remat)), model(SHALLOW))
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(Remat()) < 0.7 * kept(Remat(mode="none"))


def test_unknown_save_points_are_refused():
    problem = next(iter(collect_problems(Remat(save=("atention_out",)))))
    assert "attention_out" in str(problem)
    for name in SAVE_POINTS:
        assert not list(collect_problems(Remat(save=(name,))))


def test_too_many_unrolled_blocks_are_refused():
    assert list(collect_problems(Stack(head=(CONV,) * 13)))
    assert list(collect_problems(Stack()))
    assert list(collect_problems(Stack(period=(CONV,), repeats=0)))


def test_tied_embeddings_have_no_head():
    config = CONFIG.replace(tie_embeddings=True)
    tied = model(config)
    assert tied.head is None
    np.testing.assert_array_equal(tied.unembedding(), tied.embed.table[...].T)
