"""xLSTM (arXiv 2405.04517, 2503.13427): matrix memories with exponential gates and a feed-forward in every block."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.mlstm import MLSTM
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2503.13427"


def model(d_model: int, layers: int, heads: int, vocab: int) -> LMConfig:
    mixer = MLSTM(num_heads=heads, key_dim=d_model // heads // 2, value_dim=d_model // heads)
    d_ff = int(d_model * 2.667 + 63) // 64 * 64
    stack = Stack(period=(Block(mixers=(mixer, SwiGLU(d_ff=d_ff))),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, logit_softcap=30.0)


EARLIER = "a size of the earlier repository, in the block of the 7B model"
SIZES = {
    "small": family.Size(model(64, 4, 2, family.VOCAB)),
    "165m": family.Size(model(768, 12, 4, 50_304), published="165M", note=EARLIER),
    "1.4b": family.Size(model(2048, 24, 4, 50_304), published="1.4B", note="1.3B is its earlier name"),
    "7b": family.Size(model(4096, 32, 8, 50_304), published="7B", context=8192, rows=512),
}
config = family.runs(SIZES)
