"""RetNet (arXiv 2307.08621): retention with fixed decays and a feed-forward twice as wide as the stream."""

from mlt.config.load import sibling
from mlt.mixers.channel.mlp import MLP
from mlt.mixers.sequence.retention import Retention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2307.08621"


def model(d_model: int, layers: int, heads: int, vocab: int) -> LMConfig:
    mixer = Retention(num_heads=heads, key_dim=d_model // heads)
    stack = Stack(period=(Block(mixers=(mixer, MLP(d_ff=2 * d_model, activation="gelu"))),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True)


VOCABULARY = "32,000 ids and tied embeddings are our choice"
SIZES = {
    "small": family.Size(model(64, 4, 4, family.VOCAB)),
    "1.3b": family.Size(model(2048, 24, 8, 32_000), published="1.3B", note=VOCABULARY, learning_rate=6e-4, context=2048),
    "2.7b": family.Size(model(2560, 32, 10, 32_000), published="2.7B", note=VOCABULARY, learning_rate=3e-4, context=2048),
    "6.7b": family.Size(model(4096, 32, 16, 32_000), published="6.7B", note=VOCABULARY, learning_rate=3e-4, context=2048),
}
config = family.runs(SIZES)
