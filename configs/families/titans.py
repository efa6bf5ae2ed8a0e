"""Titans (arXiv 2501.00663): the neural long-term memory as a layer (LMM), a small MLP trained token by token."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.titans import Titans
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2501.00663"


def model(d_model: int, layers: int, mixer: Titans, d_ff: int, vocab: int) -> LMConfig:
    stack = Stack(period=(Block(mixers=(mixer, SwiGLU(d_ff=d_ff))),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True)


SIZES = {"small": family.Size(model(64, 2, Titans(num_heads=2, head_dim=32, hidden_mult=2, chunk_size=32), 176, family.VOCAB))}
config = family.runs(SIZES)
