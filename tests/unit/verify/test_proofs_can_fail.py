"""Each proof holds for a sound model and fails for one that breaks just what it proves."""

import functools
from typing import ClassVar

import jax.numpy as jnp
import pytest

from mlt.mixers.base import BuildInfo, Mixer, SequenceMixerConfig
from mlt.mixers.sequence.short_conv import ShortConv
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.linear import Linear
from mlt.nn.param import initialize, ones, param
from mlt.parallel.rules import Rules
from mlt.verify.causality import causality
from mlt.verify.decode import decode
from mlt.verify.gradients import gradients
from mlt.verify.isolation import alone, isolation
from mlt.verify.material import lively
from mlt.verify.model import Subject

PROOFS = {proof.__name__: proof for proof in (isolation, alone, causality, decode, gradients)}


class Broken(SequenceMixerConfig):
    """A sum over the row that breaks one property."""

    context: ClassVar[str] = "carry"
    flaw: str

    def build(self, info: BuildInfo) -> "BrokenMixer":
        return BrokenMixer(self.flaw, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return 0.0

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0

    @classmethod
    def example(cls) -> tuple["Broken", BuildInfo]:
        raise NotImplementedError


class BrokenMixer(Mixer):
    def __init__(self, flaw: str, info: BuildInfo):
        self.flaw = flaw
        stream = (("embed", info.d_model),)
        self.mix = Linear(stream, stream)
        self.unused = param((3,), (None,), ones, group="vector") if flaw == "dead" else None

    def __call__(self, x, ctx):
        y = self.mix(x)
        if self.flaw == "leaks_documents":
            y = y + 1e-6 * jnp.cumsum(x, axis=1)
        if self.flaw == "sees_the_future":
            following = jnp.concatenate([x[:, 1:], x[:, -1:]], axis=1)
            same = jnp.concatenate([ctx.segment_ids[:, 1:], ctx.segment_ids[:, -1:]], axis=1) == ctx.segment_ids
            y = y + 1e-6 * jnp.where(same[..., None], following, 0)
        if self.flaw == "sees_absolute_places":
            y = y + jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None] * 1e-2
        if self.flaw == "explodes":
            y = y + jnp.sqrt(jnp.sum(0.0 * x, axis=-1, keepdims=True))
        return y, {}

    def step(self, x, state, ctx):
        y, _ = self(x, ctx)
        return (y * 1.01 if self.flaw == "decodes_otherwise" else y), state


@functools.cache
def subject(flaw: str) -> Subject:
    period = (Block(mixers=(Broken(flaw=flaw), ShortConv())),)
    config = LMConfig(d_model=16, vocab_size=32, stack=Stack(period=period, repeats=2))
    return Subject(lively(initialize(config.build(), 0), 1), Rules(None), Remat(), num_ids=32, length=48)


@pytest.mark.parametrize("name", PROOFS)
def test_holds_for_a_sound_model(name):
    result = PROOFS[name](subject("none"), 0)
    assert result.passed, result.facts


CAUGHT = {
    "leaks_documents": "isolation",
    "sees_the_future": "causality",
    "sees_absolute_places": "alone",
    "decodes_otherwise": "decode",
    "explodes": "gradients",
    "dead": "gradients",
}


@pytest.mark.parametrize("flaw", CAUGHT)
def test_fails_for_the_flaw_it_is_there_for(flaw):
    result = PROOFS[CAUGHT[flaw]](subject(flaw), 0)
    assert not result.passed, result.facts
