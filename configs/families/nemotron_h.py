"""Nemotron-H (arXiv 2504.03624): Mamba-2, squared-ReLU feed-forwards and four attention layers, one mixer a block."""

from mlt.config.load import sibling
from mlt.mixers.channel.mlp import MLP
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2504.03624"


def model(d_model: int, vocab: int, mixers: tuple[Mamba2, MLP, Attention], pattern: str, repeats: int) -> LMConfig:
    """`pattern` is the released one, M for Mamba-2, - for a feed-forward, * for attention, as head|period|tail."""
    blocks = {letter: Block(mixers=(mixer,), norm_eps=1e-5) for letter, mixer in zip("M-*", mixers, strict=True)}
    head, period, tail = (tuple(blocks[letter] for letter in part) for part in pattern.split("|"))
    stack = Stack(head=head, period=period, repeats=repeats, tail=tail)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, norm_eps=1e-5)


SMALL = (
    Mamba2(num_heads=8, head_dim=16, state_dim=16, num_groups=2),
    MLP(d_ff=256),
    Attention(num_heads=4, head_dim=16, num_kv_heads=2, rope_base=None),
)
RELEASED = (
    Mamba2(num_heads=128, head_dim=64, state_dim=128, num_groups=8),
    MLP(d_ff=21_504),
    Attention(num_heads=32, head_dim=128, num_kv_heads=8, rope_base=None),
)
SIZES = {
    "small": family.Size(model(64, family.VOCAB, SMALL, "M-|M*-|M-", 2)),
    "8b": family.Size(model(4096, 131_072, RELEASED, "M-M-M-M*-|M-M-M-M-M*-|M-M-M-M-M-", 3), published="8B", context=8192),
}
config = family.runs(SIZES)
