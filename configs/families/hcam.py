"""HCAM (arXiv 2105.14039) as a language model's layer, and HSA (arXiv 2504.16795): attention inside a few found chunks."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.hcam import HCAM
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2105.14039"


def model(d_model: int, layers: int, mixer: HCAM, d_ff: int, vocab: int) -> LMConfig:
    stack = Stack(period=(Block(mixers=(mixer, SwiGLU(d_ff=d_ff))),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack)


SMALL = HCAM(num_heads=4, head_dim=16, chunk=8, selected=2, stop_gradient=False)
SIZES = {
    "small": family.Size(model(64, 3, SMALL, 176, family.VOCAB)),
    "small-hsa": family.Size(model(64, 3, SMALL.replace(chunk_positions=False, window=64), 176, family.VOCAB)),
}
config = family.runs(SIZES)
