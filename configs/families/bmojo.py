"""B'MOJO (arXiv 2407.06324): recent tokens, a fading memory of older ones and the few it failed to foresee, in one softmax."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.bmojo import BMojo
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2407.06324"


def model(d_model: int, layers: int, d_ff: int, vocab: int, mixer: BMojo) -> LMConfig:
    stack = Stack(period=(Block(mixers=(mixer, SwiGLU(d_ff=d_ff))),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack)


SMALL = BMojo(num_heads=4, head_dim=16, window=16, interval=8, memory=Mamba2(num_heads=4, head_dim=16, state_dim=16))
SIZES = {"small": family.Size(model(64, 3, 176, family.VOCAB, SMALL))}
config = family.runs(SIZES)
