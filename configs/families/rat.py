"""RAT (arXiv 2507.04416): recurrence inside chunks of 16 tokens and attention over chunks, alone or in turn with windows."""

from mlt.config.load import sibling
from mlt.mixers.channel.mlp import MLP
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.rat import RAT
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2507.04416"


def model(d_model: int, layers: int, heads: int, vocab: int, *, window: int | None = None) -> LMConfig:
    """With a window, every other layer is sliding-window attention."""
    head_dim, dense = d_model // heads, MLP(d_ff=4 * d_model, activation="gelu")
    mixers = [RAT(num_heads=heads, head_dim=head_dim)]
    if window is not None:
        mixers.append(Attention(num_heads=heads, head_dim=head_dim, window=window))
    stack = Stack(period=tuple(Block(mixers=(mixer, dense)) for mixer in mixers), repeats=layers // len(mixers))
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True)


TIED = "head tied to the embedding, our choice: apart from each other they would add 66M"
SIZES = {
    "small": family.Size(model(64, 4, 4, family.VOCAB, window=64)),
    "1.3b": family.Size(model(2048, 24, 16, 32_000), published="1.3B", note=TIED, learning_rate=8e-4, rows=512),
    "1.3b-swa": family.Size(model(2048, 24, 16, 32_000, window=1024), published="1.3B", note=TIED, learning_rate=8e-4, rows=512),
}
config = family.runs(SIZES)
