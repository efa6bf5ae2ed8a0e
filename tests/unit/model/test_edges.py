"""What layers may publish, read and share, and what is refused, with the path of the layer that is wrong."""

import pytest

from mlt.config.problems import collect_problems
from mlt.mixers.rope_scaling import LinearRope
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.bmojo import BMojo
from mlt.mixers.sequence.cross_attention import CrossAttention
from mlt.mixers.sequence.differential_attention import DifferentialAttention
from mlt.mixers.sequence.differential_cross_attention import DifferentialCrossAttention
from mlt.mixers.sequence.gmu import GMU
from mlt.mixers.sequence.long_mem import LongMem
from mlt.mixers.sequence.mamba import Mamba
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.parallel import Parallel
from mlt.mixers.sequence.zamba import SharedTransformer, ZambaLayer
from mlt.model.block import Block
from mlt.model.edges import carried, shared_parts
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

MEMORY, GATED = Mamba(publish="m"), GMU(source="m", memory_dim=32)
KEYS, CROSS = Attention(num_heads=2, head_dim=8, publish="k"), CrossAttention(source="k", num_heads=2, head_dim=8)
PAIRS = DifferentialAttention(num_heads=2, head_dim=8, publish="k")
PAIRED = DifferentialCrossAttention(source="k", num_heads=2, head_dim=8)
LONG = LinearRope(factor=4.0)
BLOCK = SharedTransformer(num_heads=2, head_dim=8, d_ff=16)
ZAMBA = ZambaLayer(name="s", transformer=BLOCK, memory=Mamba2(num_heads=2, head_dim=8), adapter_rank=None)


def blocks(*mixers) -> tuple[Block, ...]:
    return tuple(Block(mixers=(mixer,)) for mixer in mixers)


def found(**parts) -> list[tuple[str, str]]:
    model = LMConfig(d_model=16, vocab_size=32, stack=Stack(**{name: blocks(*part) for name, part in parts.items()}))
    return [(problem.path, f"{problem.rule}; {problem.ways_out}") for problem in collect_problems(model)]


@pytest.mark.parametrize(
    "parts",
    [
        {"head": [MEMORY, KEYS], "period": [GATED, CROSS]},
        {"period": [MEMORY, GATED]},
        {"period": [MEMORY], "tail": [GATED, GATED]},
        {"period": [MEMORY], "middle": [KEYS], "upper": [GATED, CROSS]},
        {"period": [KEYS.replace(rope_scaling=LONG, rotary_dim=4)], "tail": [CROSS.replace(rope_scaling=LONG, rotary_dim=4)]},
        {"period": [PAIRS], "tail": [PAIRED]},
        {"period": [ZAMBA], "tail": [ZAMBA]},
        {"head": [Parallel(mixers=(MEMORY, KEYS))], "period": [Parallel(mixers=(GATED, CROSS))]},
    ],
)
def test_what_may_be(parts):
    assert found(**parts) == []


REFUSED = {
    "nobody publishes it": ({"period": [MEMORY, GATED.replace(source="n")]}, "stack.period[1].mixers[0]", "no layer publishes"),
    "a later layer publishes it": ({"period": [GATED, MEMORY]}, "stack.period[0].mixers[0]", "only a later layer"),
    "the tail publishes it": ({"period": [GATED], "tail": [MEMORY]}, "stack.period[0].mixers[0]", "only a later layer"),
    "two publish it": ({"head": [MEMORY], "period": [MEMORY, GATED]}, "stack.period[0].mixers[0]", "head[0].mixers[0] publishes"),
    "nobody reads it": ({"head": [MEMORY, KEYS], "tail": [CROSS]}, "stack.head[0].mixers[0]", "no layer reads"),
    "the stack's own name": ({"period": [Mamba(publish="embedding")]}, "stack.period[0].mixers[0]", "the stack publishes"),
    "another width": ({"period": [MEMORY, GATED.replace(memory_dim=24)]}, "stack.period[1].mixers[0]", "memory of 24"),
    "other heads": ({"period": [KEYS, CROSS.replace(num_kv_heads=1)]}, "stack.period[1].mixers[0]", "key of 1 x 8"),
    "another rotation": ({"period": [KEYS, CROSS.replace(rope_base=500.0)]}, "stack.period[1].mixers[0]", "by base 10000"),
    "no rotation": ({"period": [KEYS, CROSS.replace(rope_base=None)]}, "stack.period[1].mixers[0]", "2 x 8 without rotation"),
    "stretched positions": ({"period": [KEYS.replace(rope_scaling=LONG), CROSS]}, "stack.period[1].mixers[0]", "LinearRope"),
    "keys of a bank": (
        {"period": [KEYS, LongMem(source="k", num_heads=2, head_dim=8, rotary_dim=4)]},
        "stack.period[1].mixers[0]",
        "in 4 channels",
    ),
    "differential keys": ({"period": [PAIRS, PAIRED.replace(rope_base=5.0)]}, "stack.period[1].mixers[0]", "by base 5"),
    "another kind": ({"period": [KEYS, GATED.replace(source="k")]}, "stack.period[1].mixers[0]", "reads memory"),
    "another part": (
        {"period": [ZAMBA, ZAMBA.replace(transformer=BLOCK.replace(d_ff=24))]},
        "stack.period[1].mixers[0]",
        "another SharedTransformer",
    ),
    "inside a mixer": (
        {"period": [BMojo(num_heads=2, head_dim=8, window=8, interval=4, memory=Mamba(publish="m"))]},
        "stack.period[0].mixers[0].memory",
        "hands nothing on",
    ),
    "a window": ({"period": [KEYS.replace(window=8), CROSS]}, "stack.period[0].mixers[0].publish", "keys of all tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    parts, path, rule = REFUSED[case]
    assert any(path == where and rule in text for where, text in found(**parts)), found(**parts)


def test_a_near_name_is_offered():
    (_, text), *_ = found(
        head=[Mamba(publish="memory"), GMU(source="memory", memory_dim=32)], tail=[GATED.replace(source="memry")]
    )
    assert "did you mean 'memory'?" in text


def test_a_scan_carries_what_is_read_behind_it():
    stack = Stack(period=blocks(MEMORY, GATED), upper=blocks(KEYS, CROSS), tail=blocks(CROSS))
    assert (carried(stack, "period", 16), carried(stack, "upper", 16)) == ((), ("k",))


def test_shared_parts_are_counted_once():
    assert shared_parts(Stack(period=blocks(ZAMBA, ZAMBA), repeats=3, tail=blocks(ZAMBA))) == {"s": BLOCK}
