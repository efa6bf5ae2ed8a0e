"""Hydra (arXiv 2508.15099), a proposal: state spaces with some attention and experts beside them, and a product-key memory.

The layout is the public prototype's: mixers side by side with gates 1, 0.15 and 0.5, attention in every fourth block, experts in
every other. Its gate over chunk means and its workspace read tokens to come, and are not here; the first token of a chunk of 32
chooses the chunk's experts.
"""

from mlt.config.load import sibling
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.product_key_memory import ProductKeyMemory
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.parallel import Parallel
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2508.15099"
GATES = {Mamba2: 1.0, Attention: 0.15, MoE: 0.5}
ROUTER = {"num_experts_per_token": 2, "router": "softmax", "chunk_len": 32, "balance_loss": 0.01}


def model(
    d_model: int, periods: int, vocab: int, mamba: Mamba2, attention: Attention, experts: MoE, memory: ProductKeyMemory
) -> LMConfig:
    """`periods` of four blocks, the last of each with attention and the memory."""
    side_by_side = ((mamba, experts), (mamba,), (mamba, experts), (mamba, attention))
    parallel = [Parallel(mixers=mixers, output_scales=tuple(GATES[type(m)] for m in mixers)) for mixers in side_by_side]
    period = (*(Block(mixers=(mixer,)) for mixer in parallel[:3]), Block(mixers=(parallel[3], memory)))
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=Stack(period=period, repeats=periods))


SMALL = (
    Mamba2(num_heads=8, head_dim=16, state_dim=16),
    Attention(num_heads=4, head_dim=16, window=64),
    MoE(num_experts=4, d_ff=64, **ROUTER),
    ProductKeyMemory(num_keys=16, num_selected=4, num_heads=2, key_dim=32),
)
PROTOTYPE = (
    Mamba2(num_heads=8, head_dim=64, state_dim=64),
    Attention(num_heads=4, head_dim=64, window=256),
    MoE(num_experts=4, d_ff=256, **ROUTER),
    ProductKeyMemory(num_keys=64, num_selected=4, num_heads=1, key_dim=64, value_dim=128),
)
SIZES = {
    "small": family.Size(model(64, 1, family.VOCAB, *SMALL)),
    "prototype": family.Size(
        model(256, 2, 50_304, *PROTOTYPE),
        note="the prototype's widths; its recurrence and vocabulary are our choice",
        context=2048,
    ),
}
config = family.runs(SIZES)
