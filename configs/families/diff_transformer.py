"""The differential transformer (arXiv 2410.05258): attention as the difference of two softmax maps."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.differential_attention import DifferentialAttention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2410.05258"


def model(d_model: int, layers: int, heads: int, d_ff: int, vocab: int) -> LMConfig:
    mixer = DifferentialAttention(num_heads=heads, head_dim=d_model // heads // 2, depth=(0, 1))
    stack = Stack(period=(Block(mixers=(mixer, SwiGLU(d_ff=d_ff)), norm_eps=1e-5),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, norm_eps=1e-5)


SIZES = {"small": family.Size(model(64, 4, 2, 176, family.VOCAB))}
config = family.runs(SIZES)
