"""Mixtral (arXiv 2401.04088): attention with grouped keys, and two of eight experts in place of every feed-forward."""

from mlt.config.load import sibling
from mlt.mixers.channel.moe import MoE
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2401.04088"


def model(d_model: int, layers: int, attention: Attention, experts: MoE, vocab: int) -> LMConfig:
    stack = Stack(period=(Block(mixers=(attention, experts), norm_eps=1e-5),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, norm_eps=1e-5)


def moe(d_ff: int, coefficient: float, layers: int) -> MoE:
    balance = family.released_balance(coefficient, 2, layers)
    return MoE(num_experts=8, num_experts_per_token=2, d_ff=d_ff, router="softmax", global_balance_loss=balance)


SMALL = (
    Attention(num_heads=4, head_dim=16, num_kv_heads=2, rope_base=1e6),
    moe(64, 0.02, layers=4),
)
EIGHT_7B = (
    Attention(num_heads=32, head_dim=128, num_kv_heads=8, rope_base=1e6),
    moe(14_336, 0.02, layers=32),
)
EIGHT_22B = (
    Attention(num_heads=48, head_dim=128, num_kv_heads=8, rope_base=1e6),
    moe(16_384, 0.001, layers=56),
)
SIZES = {
    "small": family.Size(model(64, 4, *SMALL, family.VOCAB)),
    "8x7b": family.Size(model(4096, 32, *EIGHT_7B, 32_000), published="46.7B", context=8192),
    "8x22b": family.Size(model(6144, 56, *EIGHT_22B, 32_768), published="141B", context=8192),
}
config = family.runs(SIZES)
