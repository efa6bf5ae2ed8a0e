"""Sparsity allocation (Engram, arXiv 2601.07372): one budget of sparse parameters, shared out between experts and Engram.

    mlt compare configs/sweeps/sparsity_allocation.py --arg rho=1.0,0.75,0.5 --out runs/allocation

Sparse parameters are those that a token does not activate. Of all experts that it does not run, the fraction `rho` stays; the
others' parameters become rows of Engram tables. What Engram activates (projections, convolution, the rows read) is taken off
the shared experts, which the paper does not say it does, so total and active parameters are the same for every rho, up to whole
experts, blocks of 1,024 rows and `step` hidden units.
"""

import dataclasses

from mlt.config.load import sibling
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.mixers.base import BuildInfo
from mlt.mixers.channel.engram import Engram
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.latent_attention import LatentAttention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.nn.param import named_leaves
from mlt.optim.lazy_adam import LazyAdam

family = sibling(__file__, "../base/family.py")


@dataclasses.dataclass(frozen=True)
class Scale:
    """One model at rho = 1: a dense layer, then layers of experts.

    Attributes:
        experts: of pure MoE, with its shared experts.
        dense: hidden width of the first layer.
        engram: its layers and rows are filled in.
        engram_layers: where Engram stands, counted from 0; the first is 1.
        step: hidden units by which the shared experts shrink.
    """

    d_model: int
    layers: int
    vocab: int
    attention: Attention | LatentAttention
    experts: MoE
    dense: int
    engram: Engram
    engram_layers: tuple[int, ...]
    step: int = 16
    rows: int = 128

    @property
    def unit(self) -> int:
        """Parameters of one hidden unit of an expert, in all layers of experts."""
        return 3 * self.d_model * (self.layers - 1)


SMALL_ENGRAM = Engram.as_in_paper(1, (1,), head_dim=16, heads_per_order=2, pad_token_id=family.PAD)
ENGRAM = Engram.as_in_paper(1, (1,), pad_token_id=2)
ROUTED = {"num_experts_per_token": 6, "routed_scale": 2.5}
SCALES = {
    "small": Scale(
        d_model=64,
        layers=4,
        vocab=family.VOCAB,
        attention=Attention(num_heads=4, head_dim=16, num_kv_heads=2),
        experts=MoE(num_experts=34, num_experts_per_token=2, d_ff=32, num_shared_experts=2, routed_scale=2.5),
        dense=192,
        engram=SMALL_ENGRAM,
        engram_layers=(1,),
        step=2,
    ),
    # The paper's sweep: 99 experts, 9.9B, of which 993M are active. Widths that give this are our choice.
    "10b": Scale(
        d_model=1280,
        layers=16,
        vocab=129_280,
        attention=LatentAttention(num_heads=16, key_dim=128, rotary_dim=64, kv_rank=512),
        experts=MoE(num_experts=99, d_ff=1632, num_shared_experts=1, **ROUTED),
        dense=5120,
        engram=ENGRAM,
        engram_layers=(1, 7),
        rows=1280,
    ),
    # MoE-27B; rho = 0.743 has 55 experts, as Engram-27B, without its several residual streams.
    "27b": Scale(
        d_model=2560,
        layers=30,
        vocab=129_280,
        attention=LatentAttention(num_heads=32, key_dim=128, rotary_dim=64, kv_rank=512, query_rank=768),
        experts=MoE(num_experts=72, d_ff=1536, num_shared_experts=2, **ROUTED),
        dense=10_240,
        engram=ENGRAM,
        engram_layers=(1, 14),
        rows=1280,
    ),
}


def kept_experts(scale: Scale, rho: float) -> int:
    """Routed experts: those that a token runs, and the fraction rho of the others."""
    run = scale.experts.num_experts_per_token
    return run + round(rho * (scale.experts.num_experts - run))


def engrams(scale: Scale, freed: int) -> tuple[Engram, ...]:
    """Engram layers whose tables hold `freed` parameters that a token does not read, up to half a block of rows each."""
    layers = scale.engram_layers
    step = scale.engram.head_dim * scale.engram.num_tables * len(layers)
    per_head, found, excess = freed // step, (), 0
    while not found or excess > 0:
        above, over = found, excess
        found = tuple(scale.engram.replace(layer_id=n, layer_ids=layers, rows_per_head=max(per_head, 1)) for n in layers)
        excess = sum(layer.inactive_params(scale.d_model) for layer in found) - freed
        if per_head <= 1:
            return found
        per_head -= max(excess // (4 * step), 1)
    return above if above and over < -excess else found


def activated(scale: Scale, layer: Engram) -> int:
    """Parameters of an Engram layer that a token uses: everything but the table, and the rows it reads."""
    described = layer.replace(compress_tokens=False).build(BuildInfo(scale.d_model, 1, scale.vocab))
    dense = sum(spec.size for _, spec in named_leaves(described) if spec.trainable and spec.group != "table")
    return dense + layer.num_tables * layer.head_dim


def model(scale: Scale, rho: float) -> LMConfig:
    kept = kept_experts(scale, rho)
    gone = scale.experts.num_experts - kept
    found = engrams(scale, gone * scale.experts.d_ff * scale.unit) if gone else ()
    layers = dict(zip(scale.engram_layers, found, strict=False))
    # Every expert that goes also leaves its column of each router to the shared experts.
    units = sum(activated(scale, layer) for layer in found) / scale.unit - gone / 3
    width = scale.experts.shared_width - round(units / scale.step) * scale.step
    routed = scale.experts.replace(num_experts=kept, shared_d_ff=width)

    def block(number: int) -> Block:
        front = (layers[number],) if number in layers else ()
        return Block(mixers=(*front, scale.attention, routed))

    plain = Block(mixers=(scale.attention, routed))
    second = scale.engram_layers[1] if len(scale.engram_layers) > 1 else scale.layers
    above = scale.layers - second - 1
    stack = Stack(
        head=(Block(mixers=(scale.attention, SwiGLU(d_ff=scale.dense))), block(1)),
        period=(plain,),
        repeats=second - 2,
        middle=(block(second),) if second < scale.layers else (),
        upper=(plain,) if above > 0 else (),
        upper_repeats=max(above, 1),
    )
    return LMConfig(d_model=scale.d_model, vocab_size=scale.vocab, stack=stack)


def config(
    size: str = "small",
    rho: float = 1.0,
    steps: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
) -> RunConfig:
    if size not in SCALES:
        raise UserError(f"--arg size={size}: the sweep has the sizes {', '.join(SCALES)}")
    if not 0 <= rho <= 1:
        raise UserError(f"--arg rho={rho}: must lie in [0, 1]; 1 gives every sparse parameter to experts")
    scale = SCALES[size]
    has_tables = kept_experts(scale, rho) < scale.experts.num_experts
    tables = LazyAdam() if has_tables else None
    chosen = family.Size(model(scale, rho), rows=scale.rows, tables=tables)
    return family.runs({size: chosen})(size, steps, sequence_length, batch_size)
