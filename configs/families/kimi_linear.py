"""Kimi Linear (arXiv 2510.26692): three KDA layers to one of latent attention without positions, experts in all but the first."""

from mlt.config.load import sibling
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.kimi_delta import KimiDelta
from mlt.mixers.sequence.latent_attention import LatentAttention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2510.26692"


def model(d_model: int, vocab: int, parts: tuple[KimiDelta, LatentAttention, MoE, SwiGLU], repeats: int, tail: str) -> LMConfig:
    """Layers dense-K, K, K, A, then periods of K, K, K, A, then a tail of letters K and A."""
    delta, attention, experts, dense = parts
    routed = {letter: Block(mixers=(mixer, experts), norm_eps=1e-5) for letter, mixer in (("K", delta), ("A", attention))}
    head = (Block(mixers=(delta, dense), norm_eps=1e-5), *(routed[letter] for letter in "KKA"))
    period, tail_blocks = (tuple(routed[letter] for letter in part) for part in ("KKKA", tail))
    stack = Stack(head=head, period=period, repeats=repeats, tail=tail_blocks)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, norm_eps=1e-5)


SMALL = (
    KimiDelta(num_heads=4, key_dim=16, gate_bias=False, norm_eps=1e-5),
    LatentAttention(num_heads=4, key_dim=16, rotary_dim=8, kv_rank=32, rope_base=None),
    MoE(num_experts=8, num_experts_per_token=2, d_ff=32, num_shared_experts=1, routed_scale=2.446),
    SwiGLU(d_ff=192),
)
RELEASED = (
    KimiDelta(num_heads=32, key_dim=128, gate_bias=False, norm_eps=1e-5),
    LatentAttention(num_heads=32, key_dim=128, rotary_dim=64, kv_rank=512, rope_base=None),
    MoE(num_experts=256, num_experts_per_token=8, d_ff=1024, num_shared_experts=1, routed_scale=2.446),
    SwiGLU(d_ff=9216),
)
SIZES = {
    "small": family.Size(model(64, family.VOCAB, SMALL, 1, "")),
    "48b": family.Size(model(2304, 163_840, RELEASED, 5, "KKA"), published="48B", note="the released sizes add up to ours"),
}
config = family.runs(SIZES)
