"""DeepSeek-V3 (arXiv 2412.19437): latent attention, and many small experts balanced by a bias, behind a few dense layers."""

from mlt.config.load import sibling
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.latent_attention import LatentAttention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

family = sibling(__file__, "../base/family.py")
PAPER = "2412.19437"


def model(d_model: int, layers: int, dense: tuple[int, int], attention: LatentAttention, experts: MoE, vocab: int) -> LMConfig:
    """`dense` layers come first: how many, and how wide their feed-forward is."""
    count, width = dense
    head = (Block(mixers=(attention, SwiGLU(d_ff=width))),) * count
    stack = Stack(head=head, period=(Block(mixers=(attention, experts)),), repeats=layers - count)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack)


SMALL = (
    LatentAttention(num_heads=4, key_dim=16, rotary_dim=8, kv_rank=32, query_rank=48),
    MoE(
        num_experts=8, num_experts_per_token=2, d_ff=32, num_shared_experts=1, routed_scale=2.5, num_groups=4, groups_per_token=2
    ),
)
V3 = (
    LatentAttention(num_heads=128, key_dim=128, rotary_dim=64, kv_rank=512, query_rank=1536),
    MoE(
        num_experts=256,
        num_experts_per_token=8,
        d_ff=2048,
        num_shared_experts=1,
        routed_scale=2.5,
        num_groups=8,
        groups_per_token=4,
        balance_loss=1e-4,
    ),
)
MOONLIGHT = (
    LatentAttention(num_heads=16, key_dim=128, rotary_dim=64, kv_rank=512, rope_base=50_000.0),
    MoE(num_experts=64, num_experts_per_token=6, d_ff=1408, num_shared_experts=2, routed_scale=2.446),
)
SIZES = {
    "small": family.Size(model(64, 4, (1, 192), *SMALL, family.VOCAB)),
    "16b": family.Size(
        model(2048, 27, (1, 11_264), *MOONLIGHT, 163_840), published="16B", note="Moonlight (arXiv 2502.16982)", context=8192
    ),
    "671b": family.Size(
        model(7168, 61, (3, 18_432), *V3, 129_280),
        published="671B",
        note="without the extra prediction layer",
        learning_rate=2.2e-4,
        rows=15_360,
    ),
}
config = family.runs(SIZES)
