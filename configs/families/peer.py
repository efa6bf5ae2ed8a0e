"""PEER (arXiv 2407.04153): a transformer with a million experts of one neuron, found by product keys, in its middle layer."""

from mlt.config.load import sibling
from mlt.mixers.channel.mlp import MLP
from mlt.mixers.channel.peer import PEER
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.optim.lazy_adam import LazyAdam

family = sibling(__file__, "../base/family.py")
PAPER = "2407.04153"


def model(d_model: int, before: int, after: int, attention: Attention, experts: PEER, vocab: int) -> LMConfig:
    """`before` dense layers, the one with the experts, `after` dense layers."""
    dense = Block(mixers=(attention, MLP(d_ff=4 * d_model, activation="gelu")))
    stack = Stack(
        period=(dense,), repeats=before, middle=(Block(mixers=(attention, experts)),), upper=(dense,), upper_repeats=after
    )
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True)


SMALL = (Attention(num_heads=4, head_dim=16), PEER(num_keys=32, num_selected=4, num_heads=2, key_dim=32))
MILLION = (Attention(num_heads=16, head_dim=64), PEER(num_keys=1024, num_selected=16, num_heads=8, key_dim=1024))
SIZES = {
    "small": family.Size(model(64, 2, 1, *SMALL, family.VOCAB)),
    "1m-experts": family.Size(
        model(1024, 6, 5, *MILLION, 32_000),
        note="experts, heads and selection are the source's; width, depth, vocabulary and tied embeddings are our choice",
        context=2048,
        tables=LazyAdam(rate=1.0),
    ),
}
config = family.runs(SIZES)
