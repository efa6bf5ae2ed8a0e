"""Qwen3 (arXiv 2505.09388): the dense transformer with norms on queries and keys."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2505.09388"


def model(d_model: int, layers: int, heads: int, head_dim: int, kv_heads: int, d_ff: int, vocab: int, *, tie: bool) -> LMConfig:
    attention = Attention(num_heads=heads, head_dim=head_dim, num_kv_heads=kv_heads, rope_base=1e6, qk_norm=True)
    stack = Stack(period=(Block(mixers=(attention, SwiGLU(d_ff=d_ff))),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=tie)


SIZES = {
    "small": family.Size(model(64, 4, 4, 16, 2, 192, family.VOCAB, tie=True)),
    "0.6b": family.Size(model(1024, 28, 16, 128, 8, 3072, 151_936, tie=True), published="0.6B"),
    "8b": family.Size(model(4096, 36, 32, 128, 8, 12_288, 151_936, tie=False), published="8.2B"),
}
config = family.runs(SIZES)
