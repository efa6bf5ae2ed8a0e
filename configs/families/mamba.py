"""Mamba (arXiv 2312.00752): selective state spaces alone, no attention and no feed-forward."""

from mlt.config.load import sibling
from mlt.mixers.sequence.mamba import Mamba
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2312.00752"
PADDED = 50_280
"""The tokenizer's 50,277 ids padded to a multiple of 8."""


def model(d_model: int, layers: int, vocab: int = PADDED, *, state_dim: int = 16) -> LMConfig:
    stack = Stack(period=(Block(mixers=(Mamba(state_dim=state_dim),), norm_eps=1e-5),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True, norm_eps=1e-5)


SIZES = {
    "small": family.Size(model(64, 6, family.VOCAB, state_dim=8)),
    "130m": family.Size(model(768, 24), published="130M", learning_rate=6e-4, context=2048),
    "370m": family.Size(model(1024, 48), published="370M", learning_rate=3e-4, context=2048),
    "790m": family.Size(model(1536, 48), published="790M", learning_rate=2.5e-4, context=2048),
    "1.4b": family.Size(model(2048, 48), published="1.4B", learning_rate=2e-4, context=2048),
    "2.8b": family.Size(model(2560, 64), published="2.8B", learning_rate=1.6e-4, context=2048),
}
config = family.runs(SIZES)
