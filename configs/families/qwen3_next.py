"""Qwen3-Next: three gated delta layers to one of gated attention, many small experts and a gated shared one in each."""

from mlt.config.load import sibling
from mlt.mixers.channel.moe import MoE
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2505.06708"  # of the gated attention; the model itself has a report without a number


def model(d_model: int, periods: int, vocab: int, delta: GatedDelta, attention: Attention, experts: MoE) -> LMConfig:
    mixers = (delta, delta, delta, attention)
    period = tuple(Block(mixers=(mixer, experts), unit_offset_norm=True) for mixer in mixers)
    stack = Stack(period=period, repeats=periods)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, unit_offset_norm=True)


GATED = {"rope_base": 1e7, "qk_norm": True, "unit_offset_norm": True, "output_gate": True}


def moe(num_experts: int, per_token: int, d_ff: int, layers: int) -> MoE:
    return MoE(
        num_experts=num_experts,
        num_experts_per_token=per_token,
        d_ff=d_ff,
        num_shared_experts=1,
        shared_gate=True,
        router="softmax",
        global_balance_loss=family.released_balance(0.001, per_token, layers),
    )


SMALL = (
    GatedDelta(num_heads=4, num_key_heads=2, key_dim=16),
    Attention(num_heads=4, head_dim=16, num_kv_heads=2, rotary_dim=4, **GATED),
    moe(8, 2, 32, layers=4),
)
RELEASED = (
    GatedDelta(num_heads=32, num_key_heads=16, key_dim=128),
    Attention(num_heads=16, head_dim=256, num_kv_heads=2, rotary_dim=64, **GATED),
    moe(512, 10, 512, layers=48),
)
SIZES = {
    "small": family.Size(model(64, 1, family.VOCAB, *SMALL)),
    "80b": family.Size(model(2048, 12, 151_936, *RELEASED), published="80B", note="without the extra prediction layers"),
}
config = family.runs(SIZES)
