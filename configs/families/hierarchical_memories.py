"""Hierarchical memories (arXiv 2510.02375): feed-forward layers widened by blocks that the clusters of a document point to.

The anchor, the same model without memories, is trained first and then both together: docs/fetched_memories.md.
"""

from mlt.config.load import sibling
from mlt.config.run import RunConfig
from mlt.data.cluster_rows import Clusters
from mlt.mixers.channel.hierarchical_memory import HierarchicalMemory
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.train.distill import Distill

family = sibling(__file__, "../base/family.py")
PAPER = "2510.02375"


def model(d_model: int, layers: int, heads: int, memory: HierarchicalMemory, vocab: int, *, tie: bool = False) -> LMConfig:
    attention = Attention(num_heads=heads, head_dim=d_model // heads)
    stack = Stack(period=(Block(mixers=(attention, memory)),), repeats=layers)
    return LMConfig(d_model=d_model, vocab_size=vocab, stack=stack, tie_embeddings=tie)


def published(anchor: LMConfig, without: str, bank: str, fetched: str) -> object:
    note = f"an anchor of {without}, a bank of {bank} and {fetched} fetched, as published; width and depth follow from these"
    return family.Size(anchor, note=f"{note}, the rest is our choice", context=2048)


SMALL = HierarchicalMemory(d_ff=176, units=(16, 8), branching=4, max_runs=8)
M160 = HierarchicalMemory(d_ff=1728, units=(256, 64, 16, 0))
M410 = HierarchicalMemory(d_ff=2752, units=(512, 128, 32, 0))
B1_4 = HierarchicalMemory(d_ff=5440, units=(768, 256, 16, 0))
SIZES = {
    "small": family.Size(model(64, 4, 4, SMALL, family.VOCAB)),
    "160m": published(model(640, 28, 10, M160, 32_000, tie=True), "160M", "4.6B", "18M"),
    "410m": published(model(1024, 24, 16, M410, 50_304), "410M", "12.7B", "50M"),
    "1.4b": published(model(2048, 24, 16, B1_4, 50_304), "1.4B", "21.1B", "153M"),
}
_run = family.runs(SIZES)


def config(
    size: str = "small",
    steps: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    memories: bool = True,
    anchor: str | None = None,
    frozen: bool = False,
) -> RunConfig:
    """`memories=false` is the anchor alone; `anchor=RUN` starts from such a run, and `frozen` then trains the banks alone."""
    run = _run(size, steps, sequence_length, batch_size)
    (block,) = run.model.stack.period
    attention, memory = block.mixers
    if not memories:
        plain = block.replace(mixers=(attention, SwiGLU(d_ff=memory.d_ff)))
        return run.replace(model=run.model.replace(stack=run.model.stack.replace(period=(plain,))))
    clusters = Clusters(branching=memory.branching, depth=len(memory.units), max_runs=memory.max_runs)
    run = run.replace(data=run.data.replace(clusters=clusters))
    if anchor is None:
        return run
    start = Distill(teacher=anchor, match="logits", weight=0.0, trained=("*.mixer.table",) if frozen else ("*",))
    return run.replace(train=run.train.replace(distill=start))
