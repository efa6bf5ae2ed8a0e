"""Jamba (arXiv 2403.19887): one attention layer without positions to seven of Mamba, experts in every other layer."""

from mlt.config.load import sibling
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba import Mamba
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2403.19887"


def model(d_model: int, periods: int, attention: Attention, experts: MoE, state_dim: int, vocab: int) -> LMConfig:
    mamba, dense = Mamba(inner_norm=True, state_dim=state_dim), SwiGLU(d_ff=experts.d_ff)
    pairs = [(attention if i == 4 else mamba, experts if i % 2 else dense) for i in range(8)]
    stack = Stack(period=tuple(Block(mixers=pair) for pair in pairs), repeats=periods)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack)


def moe(num_experts: int, d_ff: int, layers: int) -> MoE:
    balance = family.released_balance(0.001, 2, layers)
    return MoE(
        num_experts=num_experts,
        num_experts_per_token=2,
        d_ff=d_ff,
        router="softmax",
        renormalize=False,
        global_balance_loss=balance,
    )


SMALL = Attention(num_heads=4, head_dim=16, num_kv_heads=2, rope_base=None)
RELEASED = Attention(num_heads=32, head_dim=128, num_kv_heads=8, rope_base=None)
SIZES = {
    "small": family.Size(model(64, 1, SMALL, moe(4, 128, layers=4), 8, family.VOCAB)),
    "52b": family.Size(model(4096, 4, RELEASED, moe(16, 14_336, layers=16), 16, 65_536), published="52B"),
}
config = family.runs(SIZES)
