"""Gated linear attention (arXiv 2312.06635): a decay for each key channel."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.gated_linear_attention import GatedLinearAttention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2312.06635"


def model(d_model: int, layers: int, d_ff: int, vocab: int) -> LMConfig:
    mixer = GatedLinearAttention(num_heads=4, key_dim=d_model // 8, value_dim=d_model // 4)
    stack = Stack(period=(Block(mixers=(mixer, SwiGLU(d_ff=d_ff))),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True)


SIZES = {
    "small": family.Size(model(64, 4, 176, family.VOCAB)),
    "340m": family.Size(model(1024, 24, 2816, 32_000), published="340M", learning_rate=3e-4, context=2048),
    "1.3b": family.Size(model(2048, 24, 5632, 32_000), published="1.3B", learning_rate=3e-4, context=2048),
}
config = family.runs(SIZES)
