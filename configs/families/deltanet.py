"""DeltaNet (arXiv 2406.06484): the delta rule without decay."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.delta_net import DeltaNet
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2406.06484"


def model(d_model: int, layers: int, heads: int, d_ff: int, vocab: int) -> LMConfig:
    mixer = DeltaNet(num_heads=heads, key_dim=d_model // heads)
    stack = Stack(period=(Block(mixers=(mixer, SwiGLU(d_ff=d_ff))),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True)


SIZES = {
    "small": family.Size(model(64, 4, 4, 176, family.VOCAB)),
    "1.3b": family.Size(
        model(2048, 24, 16, 5632, 32_000),
        published="1.3B",
        note="sizes are those of GLA's 1.3B; heads of 128 and tied embeddings are our choice",
        learning_rate=3e-4,
        context=2048,
    ),
}
config = family.runs(SIZES)
