"""SambaY (arXiv 2507.06607): a lower half of Mamba and windows in turn; gated memory units and cross attention above it, which
read the last memory and the one full layer's keys. No positions anywhere."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.cross_attention import CrossAttention
from mlt.mixers.sequence.differential_attention import DifferentialAttention
from mlt.mixers.sequence.differential_cross_attention import DifferentialCrossAttention
from mlt.mixers.sequence.gmu import GMU
from mlt.mixers.sequence.mamba import Mamba
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2507.06607"


def model(
    d_model: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, *, window: int, state_dim: int
) -> LMConfig:
    """`layers` is a multiple of 4: layers / 4 pairs below, the two that publish, layers / 4 - 1 pairs above."""
    keys = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "rope_base": None}
    below = (Mamba(state_dim=state_dim), Attention(window=window, **keys))
    between = (Mamba(state_dim=state_dim, publish="memory"), Attention(publish="keys", **keys))
    above = (GMU(source="memory", memory_dim=2 * d_model), CrossAttention(source="keys", **keys))
    dense = SwiGLU(d_ff=4 * d_model)
    period, middle, upper = (
        tuple(Block(mixers=(mixer, dense), norm_eps=1e-5) for mixer in pair) for pair in (below, between, above)
    )
    stack = Stack(period=period, repeats=layers // 4, middle=middle, upper=upper, upper_repeats=layers // 4 - 1)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True, norm_eps=1e-5)


def flash(
    d_model: int, layers: int, pairs: int, kv_pairs: int, head_dim: int, vocab: int, *, window: int, state_dim: int
) -> LMConfig:
    """As Phi-4-mini-flash: differential attention over pairs of heads with biases, and LayerNorm."""
    heads = {"num_heads": pairs, "num_kv_heads": kv_pairs, "head_dim": head_dim, "rope_base": None, "output_bias": True}
    full_layer = layers // 2 + 1
    local = DifferentialAttention(window=window, qkv_bias=True, depth=(1, 2), **heads)
    full = DifferentialAttention(publish="keys", qkv_bias=True, depth=(full_layer, 0), **heads)
    cross = DifferentialCrossAttention(source="keys", query_bias=True, depth=(full_layer + 2, 2), **heads)
    below = (Mamba(state_dim=state_dim), local)
    between = (Mamba(state_dim=state_dim, publish="memory"), full)
    above, dense = (GMU(source="memory", memory_dim=2 * d_model), cross), SwiGLU(d_ff=4 * d_model)
    period, middle, upper = (
        tuple(Block(mixers=(mixer, dense), norm="layer", norm_eps=1e-5) for mixer in pair) for pair in (below, between, above)
    )
    stack = Stack(period=period, repeats=layers // 4, middle=middle, upper=upper, upper_repeats=layers // 4 - 1)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=True, norm="layer", norm_eps=1e-5)


SIZES = {
    "small": family.Size(model(64, 12, 4, 2, 16, family.VOCAB, window=32, state_dim=8)),
    "small-da": family.Size(flash(64, 12, 2, 1, 16, family.VOCAB, window=32, state_dim=8)),
    "3.8b": family.Size(
        flash(2560, 32, 20, 10, 64, 200_064, window=512, state_dim=16),
        published="3.8B",
        note="3.85B, rounded down",
        learning_rate=5e-4,
        context=8192,
        rows=1024,
    ),
}
config = family.runs(SIZES)
