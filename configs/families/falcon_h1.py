"""Falcon-H1 (arXiv 2507.22448): Mamba-2 and attention side by side in every block, then a feed-forward."""

from mlt.config.load import sibling
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.parallel import Parallel
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2507.22448"


def model(d_model: int, layers: int, vocab: int, parallel: Parallel, dense: SwiGLU, **scales: float) -> LMConfig:
    stack = Stack(period=(Block(mixers=(parallel, dense), norm_eps=1e-5),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, norm_eps=1e-5, **scales)


def mamba(heads: int, head_dim: int, state_dim: int, scales: tuple[float, ...] | None = None) -> Mamba2:
    return Mamba2(num_heads=heads, head_dim=head_dim, state_dim=state_dim, norm="none", projection_scales=scales)


def attention(heads: int, head_dim: int, kv_heads: int, key_scale: float = 1.0) -> Attention:
    """A factor on the keys is one on the scores."""
    scale = head_dim**-0.5 * key_scale
    return Attention(num_heads=heads, head_dim=head_dim, num_kv_heads=kv_heads, rope_base=1e11, scale=scale)


def half_b() -> LMConfig:
    """The released 0.5B with its fourteen forward multipliers (muP); parameters start as the project's do."""
    ssm = mamba(24, 64, 128, (0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738))
    mixers = (ssm, attention(8, 64, 2, key_scale=0.390625))
    parallel = Parallel(mixers=mixers, input_scales=(1.25, 1.0), output_scales=(0.23570226039551587, 0.9375))
    dense = SwiGLU(d_ff=2048, gate_scale=0.8838834764831844, output_scale=0.5859375)
    return model(1024, 36, 32_784, parallel, dense, embed_scale=5.656854249492381, logit_scale=0.0390625)


SMALL = Parallel(mixers=(mamba(6, 16, 32), attention(4, 16, 2)))
SEVEN_B = Parallel(mixers=(mamba(24, 128, 256), attention(12, 128, 2)))
MUP = "the forward multipliers are 1 here, and the released ones in a model that `mlt import` reads"
SIZES = {
    "small": family.Size(model(64, 4, family.VOCAB, SMALL, SwiGLU(d_ff=128))),
    "0.5b": family.Size(half_b(), published="0.5B", note="forward multipliers as released"),
    "7b": family.Size(
        model(3072, 44, 130_048, SEVEN_B, SwiGLU(d_ff=12_288)),
        published="7B",
        note=f"7.59B, a name that rounds down; {MUP}",
    ),
}
config = family.runs(SIZES)
