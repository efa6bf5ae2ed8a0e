"""The dense control: pre-norm attention with rotary positions and grouped keys, and SwiGLU (Llama 3, arXiv 2407.21783)."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.rope_scaling import Llama3Rope
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2407.21783"


def model(d_model: int, layers: int, attention: Attention, d_ff: int, vocab: int, *, tie: bool = False) -> LMConfig:
    block = Block(mixers=(attention, SwiGLU(d_ff=d_ff)), norm_eps=1e-5)
    stack = Stack(period=(block,), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=tie, norm_eps=1e-5)


LONG = Llama3Rope(factor=32.0, original_length=8192)
SMALL = Attention(num_heads=4, head_dim=16, num_kv_heads=2)
ONE_B = Attention(num_heads=32, head_dim=64, num_kv_heads=8, rope_base=500_000.0, rope_scaling=LONG)
EIGHT_B = Attention(num_heads=32, head_dim=128, num_kv_heads=8, rope_base=500_000.0)
SIZES = {
    "small": family.Size(model(64, 4, SMALL, 176, family.VOCAB)),
    "1b": family.Size(
        model(2048, 16, ONE_B, 8192, 128_256, tie=True), published="1.23B", note="1.236B, rounded down", context=8192
    ),
    "8b": family.Size(model(4096, 32, EIGHT_B, 14_336, 128_256), published="8.03B", learning_rate=3e-4, context=8192),
}
config = family.runs(SIZES)
