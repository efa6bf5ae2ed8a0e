"""Griffin and RecurrentGemma (arXiv 2402.19427, 2404.07839): two RG-LRU layers to one of local attention with one key head."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.rg_lru import RGLRU
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2402.19427"


SCALES = {64: 8.0, 2560: 50.5, 4096: 64.0}
"""The root of the width, rounded to bfloat16 as released."""


def model(d_model: int, repeats: int, tail: int, heads: int, vocab: int, *, lru: int, window: int, cap: float | None) -> LMConfig:
    """`repeats` periods of (recurrence, recurrence, attention) and `tail` recurrences; a feed-forward behind each."""
    attention = Attention(
        num_heads=heads,
        head_dim=d_model // heads,
        num_kv_heads=1,
        window=window,
        rotary_dim=d_model // heads // 2,
        output_bias=True,
    )
    dense = SwiGLU(d_ff=3 * d_model, activation="gelu_tanh", bias=True)
    recurrence = RGLRU(num_heads=heads, width=lru)
    recurrent, local = (Block(mixers=(mixer, dense), unit_offset_norm=True) for mixer in (recurrence, attention))
    stack = Stack(period=(recurrent, recurrent, local), repeats=repeats, tail=(recurrent,) * tail)
    return LMConfig(
        d_model=d_model,
        vocab_size=vocab,
        stack=stack,
        tie_embeddings=True,
        logit_softcap=cap,
        unit_offset_norm=True,
        embed_scale=SCALES[d_model],
        embed_std=d_model**-0.5,
    )


SIZES = {
    "small": family.Size(model(64, 1, 2, 4, family.VOCAB, lru=64, window=64, cap=30.0)),
    "2b": family.Size(model(2560, 8, 2, 10, 256_000, lru=2560, window=2048, cap=30.0), published="2.68B", context=8192),
    "9b": family.Size(model(4096, 12, 2, 16, 256_000, lru=4096, window=2048, cap=30.0), published="8.58B", context=8192),
}
config = family.runs(SIZES)
