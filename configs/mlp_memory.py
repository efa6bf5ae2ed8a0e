"""MLP Memory (arXiv 2508.01832): feed-forward layers on a frozen model's hidden states stand in for its datastore.

    mlt train configs/families/transformer.py --run-dir runs/base
    python tools/datastore.py build runs/base runs/store --data configs/memory_decoder.py
    python tools/datastore.py search runs/store runs/targets --neighbours 128 --temperature 16
    mlt train configs/mlp_memory.py --arg base=runs/base --arg targets=runs/targets --run-dir runs/mlp_memory
    mlt eval runs/base --suite held-out --memory runs/mlp_memory

The first layers of the base model, up to 70 % of its depth, keep their bits; the feed-forward layers go on from its stream, and
have a norm and a head of their own, which start from the base model's. The loss is 0.4 KL(p_kNN | p) + 0.6 cross-entropy.
Published: 8 layers, about 1B parameters, for a model of 7B. Their width is our choice (our sources name none), and so are rate
and steps. An imported base is at step 0: give `--arg step=0`.
"""

from mlt.config.load import sibling
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.model.block import Block
from mlt.model.stack import Stack
from mlt.optim.adamw import AdamW
from mlt.optim.schedule import WarmupCosine
from mlt.train.distill import Distill

transformer, memory_decoder = sibling(__file__, "families/transformer.py"), sibling(__file__, "memory_decoder.py")
MEMORY = ("stack.upper.*", "norm.*", "head")
SIZES = {"small": (2, 352), "8b": (8, 8192)}
"""(feed-forward layers, their width); 1.3B with the head of the 8B model, whose vocabulary is four times that of the paper's."""


def config(
    base: str = "runs/base",
    targets: str | None = None,
    weight: float = 0.4,
    depth: float = 0.7,
    step: int | None = None,
    size: str = "small",
    steps: int | None = None,
) -> RunConfig:
    """`base` is a run of families/transformer.py of the same size, `depth` the share of its layers that are read."""
    if size not in SIZES:
        raise UserError(f"--arg size={size}: there are {', '.join(SIZES)}")
    layers, d_ff = SIZES[size]
    run = transformer.config(size=size, steps=steps or (200 if size == "small" else 20_000))
    read = round(depth * run.model.stack.repeats)
    block = Block(mixers=(SwiGLU(d_ff=d_ff),), norm_eps=run.model.norm_eps)
    stack = Stack(period=run.model.stack.period, repeats=read, upper=(block,), upper_repeats=layers)
    starts = (*range(read), *[-1] * layers)
    distill = Distill(teacher=base, step=step, match="logits", weight=0.0, layers=starts, trained=MEMORY)
    return run.replace(
        model=run.model.replace(stack=stack),
        data=memory_decoder.domain(targets, run.data.batch_size, run.data.sequence_length),
        train=run.train.replace(distill=distill, neighbour_weight=None if targets is None else weight),
        optimizer=AdamW(learning_rate=3e-3 if size == "small" else 4e-4),
        schedule=WarmupCosine(warmup_steps=20),
        sample=run.sample.replace(prompt="the "),
    )
