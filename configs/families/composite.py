"""Recurrence, attention, experts, Engram and a memory layer in one model: what each does best, in a layout of ours.

Kimi Linear (arXiv 2510.26692): three layers of KDA to one of latent attention without positions, experts in all but the first.
Engram (arXiv 2601.07372) stands in the second layer and in the middle. Attention layers have a Memory+ (arXiv 2412.09764) in
place of experts, all on one table, but for the first, the middle and the last.
"""

from mlt.config.load import sibling
from mlt.mixers.channel.engram import Engram
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.product_key_memory import ProductKeyMemory
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.kimi_delta import KimiDelta
from mlt.mixers.sequence.latent_attention import LatentAttention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.optim.dense_adam import DenseAdam
from mlt.optim.lazy_adam import LazyAdam

family = sibling(__file__, "../base/family.py")
PAPER = "2510.26692"


def model(
    d_model: int,
    vocab: int,
    parts: tuple[KimiDelta, LatentAttention, MoE, ProductKeyMemory, SwiGLU, Engram],
    letters: dict[str, str],
    repeats: int,
) -> LMConfig:
    """Parts of the stack by letters. K is KDA and A attention, both with experts; D is K with a dense feed-forward, E is K
    behind Engram, M is attention with the memory. `repeats` is of both periods."""
    delta, attention, experts, memory, dense, engram = parts
    times = {"period": repeats, "upper": repeats}
    order = "".join(letters.get(part, "") * times.get(part, 1) for part in ("head", "period", "middle", "upper", "tail"))
    # Counted from 0: the hashes of a layer depend on its number, so here it gets it.
    numbers = tuple(number for number, letter in enumerate(order) if letter == "E")
    engrams = iter(engram.replace(layer_id=number, layer_ids=numbers) for number in numbers)
    kinds = {"K": (delta, experts), "A": (attention, experts), "D": (delta, dense), "M": (attention, memory)}

    def block(letter: str) -> Block:
        return Block(mixers=(next(engrams), delta, experts) if letter == "E" else kinds[letter], norm_eps=1e-5)

    blocks = {part: tuple(block(letter) for letter in letters[part]) for part in letters}
    stack = Stack(**blocks, repeats=repeats, upper_repeats=repeats)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, norm_eps=1e-5)


def memory(num_keys: int, key_dim: int, **fields: int) -> ProductKeyMemory:
    return ProductKeyMemory(num_keys=num_keys, key_dim=key_dim, shared_values="values", **fields)


SMALL = (
    KimiDelta(num_heads=4, key_dim=16, gate_bias=False, norm_eps=1e-5),
    LatentAttention(num_heads=4, key_dim=16, rotary_dim=8, kv_rank=32, rope_base=None),
    MoE(num_experts=8, num_experts_per_token=2, d_ff=32, num_shared_experts=1, routed_scale=2.446),
    memory(32, 32, num_selected=8, num_heads=2),
    SwiGLU(d_ff=192),
    Engram.as_in_paper(0, (0,), rows_per_head=1024, head_dim=16, heads_per_order=2, pad_token_id=family.PAD),
)
LARGE = (
    KimiDelta(num_heads=32, key_dim=128, gate_bias=False, norm_eps=1e-5),
    LatentAttention(num_heads=32, key_dim=128, rotary_dim=64, kv_rank=512, rope_base=None),
    MoE(num_experts=256, num_experts_per_token=8, d_ff=1024, num_shared_experts=1, routed_scale=2.446),
    memory(1024, 1152),
    SwiGLU(d_ff=9216),
    Engram.as_in_paper(0, (0,), pad_token_id=2),
)
SHALLOW = {"head": "DE", "period": "KM", "middle": "EA"}
DEEP = {"head": "DEKA", "period": "KKKM", "middle": "KKEA", "upper": "KKKM", "tail": "KKA"}
TABLES = (LazyAdam(names="*.table"), DenseAdam(names="*.values"))
SIZES = {
    "small": family.Size(model(64, family.VOCAB, SMALL, SHALLOW, 2), tables=TABLES),
    "50b": family.Size(
        model(2304, 163_840, LARGE, DEEP, 2),
        note="no published size: Kimi Linear's widths, with the Engram of 27B and a memory of 2^20 rows",
        tables=TABLES,
    ),
}
config = family.runs(SIZES)
