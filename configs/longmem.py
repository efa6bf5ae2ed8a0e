"""LongMem (arXiv 2306.07174): a side network beside a frozen model reads keys and values that the model wrote long before.

    mlt train configs/families/transformer.py --arg sequence_length=1024 --run-dir runs/base
    mlt train configs/longmem.py --arg base=runs/base --run-dir runs/longmem

The frozen model runs whole, and its head is the side network's. Side layer l starts from layer 2l + 1 and, behind its own work,
adds what layers 2l + 1 and 2l of the frozen model added to their stream. One side layer reads the bank: the keys and values of
the layer that it starts from, of earlier segments of its document. Published: 24 layers of width 1024 with a bank of 65,536
tokens behind layer 17, read by side layer 8 in segments of 1024, chunks of 4, 16 of them; rate 2e-4, Adam's betas 0.9 and 0.98,
decay 0.01, 100k updates. Our rows are long and hold the earlier segments themselves, and positions are rotary, not ALiBi.
An imported base is at step 0: give `--arg step=0`.
"""

from mlt.config.load import sibling
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.mixers.base import EMBEDDING
from mlt.mixers.channel.stream_difference import StreamDifference
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.published_stream import PublishStream, TakeStream
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.long_mem import LongMem
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.optim.adamw import AdamW
from mlt.optim.schedule import WarmupCosine
from mlt.train.distill import Distill

transformer = sibling(__file__, "families/transformer.py")
BANK = "bank"


def model(base: LMConfig, memory: dict[str, int], reader: int) -> tuple[LMConfig, tuple[int, ...]]:
    """The frozen model with its side network behind it, and the layers of it that all layers start from.

    Args:
        base: one block repeated an even number of times, 24 at most: attention and a feed-forward layer.
        memory: fields of the layer that reads the bank.
        reader: its number among the side layers.
    """
    (block,), layers = base.stack.period, base.stack.repeats
    attention, feed_forward = block.mixers
    if not isinstance(attention, Attention) or not isinstance(feed_forward, SwiGLU) or layers % 2 or layers > 24:
        raise UserError(f"longmem: the base must be up to 24 layers of attention and SwiGLU, an even number; it has {layers}")
    frozen = [block] * layers
    frozen[2 * reader + 1] = block.replace(mixers=(attention.replace(publish=BANK), feed_forward))
    for layer in range(1, layers, 2):
        own = frozen[layer]
        frozen[layer] = own.replace(mixers=(*own.mixers, PublishStream(name=f"stream_{layer + 1}")))
    side = []
    for number in range(layers // 2):
        added = StreamDifference(after=f"stream_{2 * number + 2}", before=f"stream_{2 * number}" if number else EMBEDDING)
        mixer = _reader(attention, memory) if number == reader else attention
        side.append(block.replace(mixers=(mixer, feed_forward, added)))
    # Behind the frozen model's last layer the stream is the embedded tokens again, from which the side network starts.
    frozen[-1] = frozen[-1].replace(mixers=(*frozen[-1].mixers, TakeStream()))
    half = layers // 2
    stack = Stack(head=tuple(frozen[:half]), middle=tuple(frozen[half:]), tail=tuple(side))
    return base.replace(stack=stack), (*range(layers), *range(1, layers, 2))


def _reader(attention: Attention, memory: dict[str, int]) -> LongMem:
    names = ("num_heads", "head_dim", "num_kv_heads", "rope_base", "rotary_dim", "rope_scaling")
    heads = {name: getattr(attention, name) for name in names}
    return LongMem(source=BANK, **heads, **memory)


SIZES = {
    "small": (
        transformer.SIZES["small"].model,
        {"segment": 128, "chunk": 4, "selected": 8, "bank": 1024},
        1,
    ),
    "paper": (
        transformer.model(1024, 24, Attention(num_heads=16, head_dim=64), 2816, 50_304, tie=True),
        {"segment": 1024, "chunk": 4, "selected": 16, "bank": 65_536},
        8,
    ),
}
"""(base, the reader's fields, the reader's number). Our feed-forward layers are gated: 2816 is 4096 at equal parameters."""


def config(base: str = "runs/base", step: int | None = None, size: str = "small", steps: int | None = None) -> RunConfig:
    """`base` is a run of families/transformer.py, or one of the paper's widths."""
    if size not in SIZES:
        raise UserError(f"--arg size={size}: there are {', '.join(SIZES)}")
    small = size == "small"
    wanted, starts = model(*SIZES[size])
    run = transformer.config(
        size="small" if small else "1b",
        steps=steps or (200 if small else 100_000),
        sequence_length=1024 if small else 65_536,
        batch_size=2 if small else 8,
    )
    distill = Distill(teacher=base, step=step, match="logits", weight=0.0, layers=starts, trained=("stack.tail.*",))
    return run.replace(
        model=wanted,
        train=run.train.replace(distill=distill),
        optimizer=AdamW(learning_rate=1e-3 if small else 2e-4, beta2=0.98, weight_decay=0.01),
        schedule=WarmupCosine(warmup_steps=20 if small else 2000),
    )
