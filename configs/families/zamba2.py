"""Zamba2 (arXiv 2411.15242): Mamba-2, with two transformer blocks whose weights nine depths share in turn."""

from mlt.config.load import sibling
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.zamba import SharedTransformer, ZambaLayer
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2411.15242"


def model(
    d_model: int,
    vocab: int,
    mamba: Mamba2,
    transformer: SharedTransformer,
    rank: int,
    pattern: str,
    *,
    repeats: int,
    attention_adapter: bool = False,
) -> LMConfig:
    """`pattern` has a letter a layer, m for Mamba and a or b for a use of a shared block, as head|period|tail."""
    blocks = {"m": Block(mixers=(mamba,), norm_eps=1e-5)}
    for name in "ab":
        adapters = {"adapter_rank": rank, "attention_adapter": attention_adapter}
        layer = ZambaLayer(name=name, transformer=transformer, memory=mamba, **adapters)
        blocks[name] = Block(mixers=(layer,), norm_eps=1e-5)
    head, period, tail = (tuple(blocks[letter] for letter in part) for part in pattern.split("|"))
    stack = Stack(head=head, period=period, repeats=repeats, tail=tail)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True, norm_eps=1e-5)


def mamba(heads: int, state_dim: int, groups: int = 1) -> Mamba2:
    return Mamba2(num_heads=heads, head_dim=64, state_dim=state_dim, num_groups=groups)


def transformer(d_model: int, d_ff: int, rope_base: float | None = None) -> SharedTransformer:
    return SharedTransformer(num_heads=32, head_dim=d_model // 16, d_ff=d_ff, rope_base=rope_base)


SMALL = (Mamba2(num_heads=8, head_dim=16, state_dim=16), SharedTransformer(num_heads=4, head_dim=32, d_ff=128), 8)
ONE_B = (mamba(64, 128), transformer(2048, 8192, 10_000.0), 128)
THREE_B = (mamba(80, 64), transformer(2560, 10_240), 128)
SIZES = {
    "small": family.Size(model(64, family.VOCAB, *SMALL, "m|ambm|a", repeats=2)),
    # One shared block, used at layers 5, 11, .. 35 of 38, with adapters on its attention too.
    "1.2b": family.Size(
        model(2048, 32_000, *ONE_B, "|mmmmma|mm", repeats=6, attention_adapter=True),
        published="1.22B",
    ),
    # Uses at layers 6, 12, 18, 24, 30, 36, 42, 47 and 51 of 54.
    "2.7b": family.Size(
        model(2560, 32_000, *THREE_B, "mmmmmm|ammmmmbmmmmm|ammmmbmmmamm", repeats=3),
        published="2.7B",
    ),
}
config = family.runs(SIZES)
