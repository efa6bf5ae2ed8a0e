"""Lizard (arXiv 2507.09025): gated linear attention beside a short window with sinks, in place of a transformer's attention."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.lizard import Lizard
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2507.09025"


def model(d_model: int, layers: int, mixer: Lizard, d_ff: int, vocab: int) -> LMConfig:
    block = Block(mixers=(mixer, SwiGLU(d_ff=d_ff)), norm_eps=1e-5)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=Stack(period=(block,), repeats=layers), norm_eps=1e-5)


SIZES = {
    "small": family.Size(model(64, 4, Lizard(num_heads=4, head_dim=16, num_kv_heads=2, window=32), 176, family.VOCAB)),
    "8b": family.Size(
        model(4096, 32, Lizard(num_heads=32, head_dim=128, num_kv_heads=8), 14_336, 128_256),
        published="8B",
        note="Llama 3 8B (8.03B) and feature maps, gates and sinks",
        context=2048,
    ),
}
config = family.runs(SIZES)
