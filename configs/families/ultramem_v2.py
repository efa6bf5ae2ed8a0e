"""UltraMemV2 (arXiv 2508.18756): beside every feed-forward a small memory branch, all of them on one ring of rows."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.channel.ultra_mem import Ring, UltraMem, analytic_value_std
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.parallel import Parallel
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.optim.dense_adam import DenseAdam

family = sibling(__file__, "../base/family.py")
PAPER = "2508.18756"


def model(d_model: int, layers: int, attention: Attention, d_ff: int, memory: UltraMem, vocab: int, *, tie: bool) -> LMConfig:
    std = analytic_value_std(
        d_model=d_model,
        d_ff=d_ff,
        num_layers=layers,
        num_selected=memory.num_selected,
        value_dim=memory.value_dim,
        pre_value_dim=memory.pre_value_dim,
    )
    branch = memory.replace(value_std=std, ring=Ring(name="rows", num_layers=layers, share=0.5))
    block = Block(mixers=(attention, Parallel(mixers=(SwiGLU(d_ff=d_ff), branch))), norm_eps=1e-5)
    stack = Stack(period=(block,), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=tie, norm_eps=1e-5)


SMALL = (
    Attention(num_heads=4, head_dim=16, qk_norm=True),
    128,
    UltraMem(num_keys=24, num_selected=8, key_dim=16, value_dim=16, pre_value_dim=16),
)
OPEN = (
    Attention(num_heads=12, head_dim=64, qk_norm=True),
    2496,
    UltraMem(num_keys=360, num_selected=32, key_dim=192, value_dim=192, pre_value_dim=192),
)
SEVEN_B = (
    Attention(num_heads=16, head_dim=128, qk_norm=True),
    6656,
    UltraMem(num_keys=528, num_selected=128, key_dim=512, value_dim=768, pre_value_dim=384),
)
# Layers share the rows, and their optimizer is the source's, at the rate that was best for long runs.
TABLE = DenseAdam(rate=1.0, weight_decay=0.1)
SIZES = {
    "small": family.Size(model(64, 4, *SMALL, family.VOCAB, tie=True)),
    "1.2b": family.Size(
        model(768, 20, *OPEN, 50_304, tie=True),
        published="1.2B",
        note="227M active stated, 236M here; a layer has a key for every row and column of its half of the ring",
        tables=TABLE,
    ),
    "7b": family.Size(
        model(2048, 16, *SEVEN_B, 50_304, tie=False),
        published="7B",
        note="called 1B/7B; the feed-forward width is not stated, ours makes 1.29B active",
        tables=TABLE,
    ),
}
config = family.runs(SIZES)
