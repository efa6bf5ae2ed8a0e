"""Product-key memory (arXiv 1907.05242): a transformer with a table of values, found by product keys, for one feed-forward."""

from mlt.config.load import sibling
from mlt.mixers.channel.mlp import MLP
from mlt.mixers.channel.product_key_memory import ProductKeyMemory
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.optim.lazy_adam import LazyAdam

family = sibling(__file__, "../base/family.py")
PAPER = "1907.05242"


def model(d_model: int, before: int, after: int, attention: Attention, memory: ProductKeyMemory, vocab: int) -> LMConfig:
    """`before` layers, the one with the memory, `after` layers."""
    dense = Block(mixers=(attention, MLP(d_ff=4 * d_model, activation="gelu", bias=True)))
    stack = Stack(
        period=(dense,), repeats=before, middle=(Block(mixers=(attention, memory)),), upper=(dense,), upper_repeats=after
    )
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True)


SMALL = (
    Attention(num_heads=4, head_dim=16),
    ProductKeyMemory(num_keys=32, num_selected=8, num_heads=2, key_dim=32, gated=False, bias=True),
)
RELEASED = (
    Attention(num_heads=16, head_dim=64),
    ProductKeyMemory(num_keys=512, num_selected=32, num_heads=4, key_dim=256, gated=False, bias=True),
)
SIZES = {
    "small": family.Size(model(64, 2, 1, *SMALL, family.VOCAB)),
    "12-layer": family.Size(
        model(1024, 5, 6, *RELEASED, 60_000),
        note="keys, heads and values are the released code's; width, place of the memory and vocabulary are our choice",
        learning_rate=2.5e-4,
        context=512,
        rows=512,
        tables=LazyAdam(rate=4.0, beta2=0.999),
    ),
}
config = family.runs(SIZES)
