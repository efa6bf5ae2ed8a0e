"""MoVE (arXiv 2601.22887), a mixture of value embeddings: one bank of rows a token, which every layer mixes into its values.

The transformer is nanochat's, as in the paper. Its banks are "x8", "x4" and "x2", read here as slots a token.
"""

from mlt.config.load import sibling
from mlt.mixers.channel.mlp import MLP
from mlt.mixers.sequence.value_embeddings import MoVEAttention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2601.22887"


def model(d_model: int, layers: int, heads: int, slots: int, vocab: int, *, cap: float | None) -> LMConfig:
    sizes = {"num_heads": heads, "head_dim": d_model // heads, "qk_norm": True, "vocab_size": vocab, "num_slots": slots}
    holder, reader = MoVEAttention(**sizes, publish_bank="bank"), MoVEAttention(**sizes, bank="bank")
    head, period = (Block(mixers=(mixer, MLP(d_ff=4 * d_model))) for mixer in (holder, reader))
    stack = Stack(head=(head,), period=(period,), repeats=layers - 1)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, logit_softcap=cap)


def published(layers: int, slots: int, without: str) -> object:
    note = f"{without} without bank and gates, which is the published count; what x{slots} counts is our reading"
    return family.Size(model(64 * layers, layers, layers // 2, slots, 65_536, cap=15.0), note=note, context=2048)


SIZES = {
    "small": family.Size(model(64, 4, 4, 2, family.VOCAB, cap=None)),
    "d12": published(12, 8, "186M"),
    "d20": published(20, 4, "561M"),
    "d32": published(32, 2, "1.88B"),
}
config = family.runs(SIZES)
