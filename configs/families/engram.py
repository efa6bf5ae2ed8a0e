"""Engram (arXiv 2601.07372): latent attention and fine-grained experts, with two n-gram tables at an early and a middle layer.

Four residual streams, mixed by manifold-constrained hyper-connections (2512.24880); each Engram layer takes them all. Sizes with
`v4.1` in their name have the layer of the released DeepSeek-V4.1 in place of the paper's, and its optimizer of tables.
"""

from collections.abc import Callable

from mlt.config.load import sibling
from mlt.mixers.channel.engram import Engram
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.latent_attention import LatentAttention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.model.streams import HyperConnections
from mlt.optim.sinkhorn_momentum import SinkhornMomentum

family = sibling(__file__, "../base/family.py")
PAPER = "2601.07372"
PUBLISHED_VOCAB = 129_280
STREAMS = 4


def model(
    d_model: int,
    depth: int,
    vocab: int,
    engram: Callable[[int, tuple[int, ...]], Engram],
    layers: tuple[int, int],
    parts: tuple[LatentAttention, SwiGLU, MoE],
) -> LMConfig:
    """`depth` layers counted from 0, the first dense. Those in `layers` begin with an Engram layer that has their number."""
    attention, dense, experts = parts
    first, second = layers
    routed = Block(mixers=(attention, experts))
    with_memory = {number: Block(mixers=(engram(number, layers), attention, experts)) for number in layers}
    stack = Stack(
        head=(Block(mixers=(attention, dense)), *(with_memory.get(number, routed) for number in range(1, first + 1))),
        period=(routed,),
        repeats=second - first - 1,
        middle=(with_memory[second],),
        upper=(routed,),
        upper_repeats=depth - second - 1,
        hyper_connections=HyperConnections(streams=STREAMS),
    )
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack)


def small(constructor: Callable[..., Engram], rows_per_head: int, head_dim: int) -> LMConfig:
    """Tables of 16 or 24 times so many rows."""
    parts = (
        LatentAttention(num_heads=4, key_dim=16, rotary_dim=8, kv_rank=32),
        SwiGLU(d_ff=192),
        MoE(num_experts=8, num_experts_per_token=2, d_ff=32, num_shared_experts=1),
    )
    fields = {"branches": STREAMS, "rows_per_head": rows_per_head, "head_dim": head_dim, "pad_token_id": 258}
    engram = lambda number, layers: constructor(number, layers, **fields)  # noqa: E731
    return model(64, 5, family.VOCAB, engram, (1, 3), parts)


def of_paper(**fields: int) -> LMConfig:
    """Thirty layers of width 2,560 with 55 routed experts. The expert width is what the stated totals leave."""
    parts = (
        LatentAttention(num_heads=32, key_dim=128, rotary_dim=64, kv_rank=512, query_rank=640),
        SwiGLU(d_ff=10_240),
        MoE(num_experts=55, num_experts_per_token=6, d_ff=1536, num_shared_experts=2),
    )
    engram = lambda number, layers: Engram.as_in_paper(number, layers, branches=STREAMS, pad_token_id=2, **fields)  # noqa: E731
    return model(2560, 30, PUBLISHED_VOCAB, engram, (1, 14), parts)


def of_v4_1() -> LMConfig:
    """Forty layers of width 5,120 with 384 routed experts."""
    parts = (
        LatentAttention(num_heads=64, key_dim=128, rotary_dim=64, kv_rank=512, query_rank=1536),
        SwiGLU(d_ff=18_432),
        MoE(num_experts=384, num_experts_per_token=6, d_ff=2304, num_shared_experts=1),
    )
    engram = lambda number, layers: Engram.as_in_v4_1(number, layers, branches=STREAMS, pad_token_id=2)  # noqa: E731
    return model(5120, 40, PUBLISHED_VOCAB, engram, (1, 14), parts)


OURS = "expert width, ranks of the attention and the dense layer are our choice"
V4_1 = "552B and 196B of tables; the backbone is of the stated depth, width and experts, the rest our choice"
SIZES = {
    "small": family.Size(small(Engram.as_in_paper, 1024, 8)),
    "small-v4.1": family.Size(small(Engram.as_in_v4_1, 256, 32), tables=SinkhornMomentum()),
    "27b": family.Size(of_paper(), published="26.7B", note=OURS, context=4096, rows=1280),
    "40b": family.Size(of_paper(rows_per_head=7_239_680), published="39.5B", note=OURS, context=4096, rows=1280),
    "v4.1": family.Size(of_v4_1(), published="748B", note=V4_1, learning_rate=2.6e-4, tables=SinkhornMomentum()),
}
config = family.runs(SIZES)
