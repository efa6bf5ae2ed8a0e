"""Gated DeltaNet (arXiv 2412.06464): the gated delta rule alone, or in turn with sliding windows (H1)."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2412.06464"


def model(d_model: int, layers: int, d_ff: int, vocab: int, delta: GatedDelta, attention: Attention | None = None) -> LMConfig:
    mixers = [delta] if attention is None else [delta, attention]
    stack = Stack(period=tuple(Block(mixers=(mixer, SwiGLU(d_ff=d_ff))) for mixer in mixers), repeats=layers // len(mixers))
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True)


SMALL = GatedDelta(num_heads=2, key_dim=24, value_dim=48)
LARGE = GatedDelta(num_heads=6, key_dim=256, value_dim=512)
LOCAL = Attention(num_heads=16, head_dim=128, window=2048)
DEPTH = "the source states no depth; this one and tied embeddings are our choice"
SIZES = {
    "small": family.Size(model(64, 4, 176, family.VOCAB, SMALL)),
    "1.3b": family.Size(model(2048, 21, 5632, 32_000, LARGE), published="1.3B", note=DEPTH),
    "1.3b-h1": family.Size(model(2048, 22, 5632, 32_000, LARGE, LOCAL), published="1.3B", note=DEPTH),
}
config = family.runs(SIZES)
