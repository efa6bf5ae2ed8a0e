"""TTT (arXiv 2407.04620): the state of each head is a linear model trained on the fly, in Mamba's backbone."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.ttt import TTT
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2407.04620"


def model(d_model: int, layers: int, heads: int, d_ff: int, vocab: int) -> LMConfig:
    mixer = TTT(num_heads=heads, head_dim=d_model // heads)
    stack = Stack(period=(Block(mixers=(mixer, SwiGLU(d_ff=d_ff))),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True)


NAMES = "sizes are named after transformers of the same shape"
SIZES = {
    "small": family.Size(model(64, 2, 4, 176, family.VOCAB)),
    "125m": family.Size(
        model(768, 12, 12, 2048, 32_000), published="125M", note=NAMES, learning_rate=3e-3, context=2048, rows=256
    ),
    "350m": family.Size(
        model(1024, 24, 16, 2736, 32_000), published="350M", note=NAMES, learning_rate=1.5e-3, context=2048, rows=256
    ),
    "760m": family.Size(
        model(1536, 24, 16, 4096, 32_000), published="760M", note=NAMES, learning_rate=1.25e-3, context=2048, rows=256
    ),
    "1.3b": family.Size(model(2048, 24, 32, 5504, 32_000), published="1.3B", learning_rate=1e-3, context=2048, rows=256),
}
config = family.runs(SIZES)
