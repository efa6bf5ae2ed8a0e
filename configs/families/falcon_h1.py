"""Falcon-H1 (arXiv 2507.22448): Mamba-2 and attention side by side in every block, then a feed-forward."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.parallel import Parallel
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2507.22448"


def model(d_model: int, layers: int, vocab: int, mamba: Mamba2, attention: Attention, d_ff: int, *, tie: bool) -> LMConfig:
    block = Block(mixers=(Parallel(mixers=(mamba, attention)), SwiGLU(d_ff=d_ff)), norm_eps=1e-5)
    stack = Stack(period=(block,), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=tie, norm_eps=1e-5)


def mamba(heads: int, head_dim: int, state_dim: int) -> Mamba2:
    return Mamba2(num_heads=heads, head_dim=head_dim, state_dim=state_dim, norm="none")


def attention(heads: int, head_dim: int, kv_heads: int) -> Attention:
    return Attention(num_heads=heads, head_dim=head_dim, num_kv_heads=kv_heads, rope_base=1e11)


MUP = "the forward multipliers are 1"
SIZES = {
    "small": family.Size(model(64, 4, family.VOCAB, mamba(6, 16, 32), attention(4, 16, 2), 128, tie=False)),
    "0.5b": family.Size(
        model(1024, 36, 32_784, mamba(24, 64, 128), attention(8, 64, 2), 2048, tie=False), published="0.5B", note=MUP
    ),
    "7b": family.Size(
        model(3072, 44, 130_048, mamba(24, 128, 256), attention(12, 128, 2), 12_288, tie=False),
        published="7B",
        note=f"7.59B, a name that rounds down; {MUP}",
    ),
}
config = family.runs(SIZES)
