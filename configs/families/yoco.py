"""YOCO (arXiv 2405.05254): gated retention below, and above it cross attention to keys and values that are computed once."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.cross_attention import CrossAttention
from mlt.mixers.sequence.retention import Retention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2405.05254"


def model(d_model: int, layers: int, heads: int, kv_heads: int, d_ff: int, vocab: int) -> LMConfig:
    """The first layer of the upper half owns the keys that all of it reads."""
    keys = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": d_model // heads}
    below = Retention(num_heads=heads, key_dim=d_model // heads, decay="gated")
    period, middle, upper = (
        (Block(mixers=(mixer, SwiGLU(d_ff=d_ff)), norm_eps=1e-5),)
        for mixer in (below, Attention(publish="keys", **keys), CrossAttention(source="keys", **keys))
    )
    stack = Stack(period=period, repeats=layers // 2, middle=middle, upper=upper, upper_repeats=layers // 2 - 1)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, norm_eps=1e-5)


SIZES = {"small": family.Size(model(64, 6, 4, 2, 176, family.VOCAB))}
config = family.runs(SIZES)
