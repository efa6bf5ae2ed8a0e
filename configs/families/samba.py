"""Samba (arXiv 2406.07522): Mamba and sliding-window attention in turn, a feed-forward behind each."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba import Mamba
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2406.07522"


def model(d_model: int, layers: int, heads: int, d_ff: int, vocab: int, *, window: int, state_dim: int = 16) -> LMConfig:
    attention = Attention(num_heads=heads, head_dim=d_model // heads, window=window)
    mixers = (Mamba(state_dim=state_dim), attention)
    period = tuple(Block(mixers=(mixer, SwiGLU(d_ff=d_ff)), norm_eps=1e-5) for mixer in mixers)
    stack = Stack(period=period, repeats=layers // 2)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True, norm_eps=1e-5)


SIZES = {
    "small": family.Size(model(64, 4, 4, 176, family.VOCAB, window=64, state_dim=8)),
    "421m": family.Size(model(1536, 12, 12, 4096, 32_000, window=2048), published="421M", note="421.8M, rounded down", rows=512),
    "1.3b": family.Size(model(2304, 18, 18, 6144, 32_000, window=2048), published="1.3B", rows=512),
}
config = family.runs(SIZES)
