"""Layer-wise value embeddings: every second layer adds a row that the token points to, of a table of its own, to its values.

The transformer is nanochat's: squared ReLUs, norms on queries and keys, capped logits; tables in alternate layers, the last
one included. The name is that of arXiv 2601.22887, which compares with it; nanochat has no paper.
"""

from mlt.config.load import sibling
from mlt.mixers.channel.mlp import MLP
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.value_embeddings import LaVEAttention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2601.22887"


def model(d_model: int, layers: int, heads: int, vocab: int, *, cap: float | None) -> LMConfig:
    attention = {"num_heads": heads, "head_dim": d_model // heads, "qk_norm": True}
    pair = (Attention(**attention), LaVEAttention(**attention, vocab_size=vocab))
    period = tuple(Block(mixers=(mixer, MLP(d_ff=4 * d_model))) for mixer in pair)
    stack = Stack(period=period, repeats=layers // 2)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, logit_softcap=cap)


def published(layers: int, without: str) -> object:
    note = f"{without} without tables and gates, as the paper counts this model; the vocabulary of that count"
    return family.Size(model(64 * layers, layers, layers // 2, 65_536, cap=15.0), note=note, context=2048)


SIZES = {
    "small": family.Size(model(64, 4, 4, family.VOCAB, cap=None)),
    "d12": published(12, "186M"),
    "d20": published(20, "561M"),
}
config = family.runs(SIZES)
