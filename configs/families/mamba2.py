"""Mamba-2 (arXiv 2405.21060): scalar decays, so that the recurrence is matrix products; no feed-forward."""

from mlt.config.load import sibling
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2405.21060"
PADDED = 50_288
"""The tokenizer's 50,277 ids padded to a multiple of 16."""


def model(d_model: int, layers: int, vocab: int = PADDED, *, head_dim: int = 64, state_dim: int = 128) -> LMConfig:
    mixer = Mamba2(num_heads=2 * d_model // head_dim, head_dim=head_dim, state_dim=state_dim)
    stack = Stack(period=(Block(mixers=(mixer,), norm_eps=1e-5),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True, norm_eps=1e-5)


SIZES = {
    "small": family.Size(model(64, 6, family.VOCAB, head_dim=16, state_dim=32)),
    "130m": family.Size(model(768, 24), published="130M", learning_rate=6e-4, context=2048),
    "370m": family.Size(model(1024, 48), published="370M", learning_rate=3e-4, context=2048),
    "780m": family.Size(model(1536, 48), published="780M", learning_rate=2.5e-4, context=2048),
    "1.3b": family.Size(model(2048, 48), published="1.3B", learning_rate=2e-4, context=2048),
    "2.7b": family.Size(model(2560, 64), published="2.7B", learning_rate=1.6e-4, context=2048),
}
config = family.runs(SIZES)
