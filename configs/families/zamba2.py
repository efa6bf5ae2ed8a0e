"""Zamba2 (arXiv 2411.15242): Mamba-2, with two transformer blocks whose weights nine depths share in turn."""

from mlt.config.load import sibling
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.zamba import SharedTransformer, ZambaLayer
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2411.15242"


def model(d_model: int, vocab: int, mamba: Mamba2, transformer: SharedTransformer, rank: int, pattern: str) -> LMConfig:
    """`pattern` has a letter a layer, m for Mamba and a or b for a use of a shared block, as head|period|tail."""
    blocks = {"m": Block(mixers=(mamba,), norm_eps=1e-5)}
    for name in "ab":
        layer = ZambaLayer(name=name, transformer=transformer, memory=mamba, adapter_rank=rank)
        blocks[name] = Block(mixers=(layer,), norm_eps=1e-5)
    head, period, tail = (tuple(blocks[letter] for letter in part) for part in pattern.split("|"))
    repeats = 3 if len(period) == 12 else 2
    stack = Stack(head=head, period=period, repeats=repeats, tail=tail)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True, norm_eps=1e-5)


SMALL = (Mamba2(num_heads=8, head_dim=16, state_dim=16), SharedTransformer(num_heads=4, head_dim=32, d_ff=128), 8)
RELEASED = (Mamba2(num_heads=80, head_dim=64, state_dim=64), SharedTransformer(num_heads=32, head_dim=160, d_ff=10_240), 128)
SIZES = {
    "small": family.Size(model(64, family.VOCAB, *SMALL, "m|ambm|a")),
    # Uses at layers 6, 12, 18, 24, 30, 36, 42, 47 and 51 of 54.
    "2.7b": family.Size(model(2560, 32_000, *RELEASED, "mmmmmm|ammmmmbmmmmm|ammmmbmmmamm"), published="2.7B"),
}
config = family.runs(SIZES)
