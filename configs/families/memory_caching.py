"""Memory Caching (arXiv 2602.24281): the gated delta rule that keeps and reads its state of every segment (GRM)."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.mixers.sequence.memory_caching import MemoryCaching
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2602.24281"


def model(d_model: int, layers: int, mixer: MemoryCaching, d_ff: int, vocab: int) -> LMConfig:
    stack = Stack(period=(Block(mixers=(mixer, SwiGLU(d_ff=d_ff))),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True)


SMALL = MemoryCaching(memory=GatedDelta(num_heads=2, key_dim=24, value_dim=48), segment=8)
SIZES = {"small": family.Size(model(64, 2, SMALL, 176, family.VOCAB))}
config = family.runs(SIZES)
