"""Memory+ (arXiv 2412.09764): Llama with a gated product-key memory in place of three feed-forward layers, all on one table."""

from mlt.config.load import sibling
from mlt.mixers.channel.product_key_memory import ProductKeyMemory
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.optim.dense_adam import DenseAdam

family = sibling(__file__, "../base/family.py")
PAPER = "2412.09764"


def model(
    d_model: int, attention: Attention, d_ff: int, num_keys: int, vocab: int, *, stride: int = 8, last: int = 0, **chosen: int
) -> LMConfig:
    """Three periods of `stride` layers, whose middle layer has the memory, then `last` layers more."""
    keys = {"num_keys": num_keys, "key_dim": d_model // 2, **chosen}
    memory = ProductKeyMemory(query_norm=False, bias=True, shared_values="values", **keys)
    dense, keyed = (Block(mixers=(attention, mixer), norm_eps=1e-5) for mixer in (SwiGLU(d_ff=d_ff), memory))
    period = (*(dense,) * (stride // 2), keyed, *(dense,) * (stride - stride // 2 - 1))
    stack = Stack(period=period, repeats=3, upper=(dense,) if last else (), upper_repeats=last or 1)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, norm_eps=1e-5)


SMALL = Attention(num_heads=4, head_dim=16, num_kv_heads=2)
BASE = Attention(num_heads=16, head_dim=64)
EIGHT_B = Attention(num_heads=32, head_dim=128, num_kv_heads=8, rope_base=500_000.0)
# Layers share the table, and its optimizer is the source's: Adam of every row, decay included, at its own rate.
TABLE = DenseAdam(rate=10.0, weight_decay=0.1)
SIZES = {
    "small": family.Size(model(64, SMALL, 176, 48, family.VOCAB, stride=2, num_selected=8, num_heads=2)),
    "373m": family.Size(
        model(1024, BASE, 2816, 1024, 32_000),
        note="its base has 373M; three feed-forward layers go, a table of 2^20 rows (1.07B) comes",
        learning_rate=1e-4,
        tables=TABLE,
    ),
    "8b": family.Size(
        model(4096, EIGHT_B, 14_336, 4096, 128_256, last=8),
        note="its base has 8.03B; the table has 2^36 values, which the source calls 64B",
        learning_rate=1e-4,
        tables=TABLE,
    ),
}
config = family.runs(SIZES)
