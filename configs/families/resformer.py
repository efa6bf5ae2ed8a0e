"""ResFormer (arXiv 2410.17897): a transformer whose layers mix the first layer's values into their own."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2410.17897"


def model(d_model: int, layers: int, heads: int, d_ff: int, vocab: int) -> LMConfig:
    first = Attention(num_heads=heads, head_dim=d_model // heads, publish_values="first values")
    later = Attention(num_heads=heads, head_dim=d_model // heads, value_residual="first values", value_mix="learned")
    head, period = (Block(mixers=(mixer, SwiGLU(d_ff=d_ff))) for mixer in (first, later))
    stack = Stack(head=(head,), period=(period,), repeats=layers - 1)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack)


SIZES = {"small": family.Size(model(64, 4, 4, 176, family.VOCAB))}
config = family.runs(SIZES)
