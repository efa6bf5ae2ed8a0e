"""MemMamba (arXiv 2510.03279): Mamba that first reads a pool of summaries of its past. The paper gives 24 layers, no width."""

from mlt.config.load import sibling
from mlt.mixers.sequence.mamba import Mamba
from mlt.mixers.sequence.mem_mamba import MemMamba
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2510.03279"


def model(d_model: int, layers: int, vocab: int, mixer: MemMamba) -> LMConfig:
    """Every fourth layer reads the summaries of the three in front of it."""
    names = ("notes 0", "notes 1", "notes 2")
    mixers = (*(mixer.replace(publish=name) for name in names), mixer.replace(sources=names))
    period = tuple(Block(mixers=(mixer,), norm_eps=1e-5) for mixer in mixers)
    stack = Stack(period=period, repeats=layers // len(period))
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True, norm_eps=1e-5)


SMALL = MemMamba(memory=Mamba(state_dim=8), summary_dim=32, num_heads=2, slots=8, block=16)
SIZES = {
    "small": family.Size(model(64, 4, family.VOCAB, SMALL)),
    "24-layer": family.Size(
        model(768, 24, 50_280, MemMamba()),
        note="width and embedding are Mamba-130M's, our choice",
        learning_rate=1e-4,
        context=8192,
    ),
}
config = family.runs(SIZES)
