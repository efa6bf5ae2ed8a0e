"""Mixture of memories (arXiv 2502.13685): each token writes and reads two of four gated delta states and a shared one."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mixture_of_memories import MixtureOfMemories
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2502.13685"


def model(
    d_model: int, layers: int, d_ff: int, vocab: int, *, heads: int = 4, key_dim: int = 256, hybrid: bool = False
) -> LMConfig:
    """`hybrid` makes every eighth layer attention."""
    memory = MixtureOfMemories(num_heads=heads, key_dim=key_dim)
    mixers = [memory] * 7 + [Attention(num_heads=d_model // 128, head_dim=128)] if hybrid else [memory]
    stack = Stack(period=tuple(Block(mixers=(mixer, SwiGLU(d_ff=d_ff))) for mixer in mixers), repeats=layers // len(mixers))
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack)


ACTIVE = "the stated count is near what a token activates, without embeddings: two memories and the shared one of five"
SIZES = {
    "small": family.Size(model(64, 2, 128, family.VOCAB, heads=2, key_dim=32)),
    "380m": family.Size(model(1024, 24, 2048, 32_000), published="380M", note=ACTIVE, learning_rate=3e-4, context=2048, rows=256),
    "1.3b": family.Size(
        model(2048, 24, 5632, 32_000), published="1.3B", note=ACTIVE, learning_rate=3e-4, context=2048, rows=1024
    ),
    "1.3b-hybrid": family.Size(
        model(2048, 24, 5632, 32_000, hybrid=True), published="1.3B", note=ACTIVE, learning_rate=3e-4, context=2048, rows=1024
    ),
}
config = family.runs(SIZES)
