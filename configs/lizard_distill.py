"""Lizard's two stages (arXiv 2507.09025): a softmax transformer becomes gated linear attention beside a short window.

    mlt train configs/families/transformer.py --run-dir runs/teacher
    mlt train configs/lizard_distill.py --arg teacher=runs/teacher --run-dir runs/lizard_1
    mlt train configs/lizard_distill.py --arg teacher=runs/teacher --arg start=runs/lizard_1 --run-dir runs/lizard_2

The first stage trains feature maps, gates, sinks and alpha to give what the teacher's attention gives, everything else being
the teacher's. The second, which begins where `start` stopped, trains queries, keys and values for the language model's loss:
whole matrices, where the paper has adapters of rank 8 (its own comparison: 61.4 and 61.2 on MMLU). Rates, betas, rows and steps
of the 8B size are the paper's, 20M tokens a stage; no weight decay is our choice. An imported teacher is at step 0: give
`--arg step=0`.
"""

from mlt.config.load import sibling
from mlt.config.run import RunConfig
from mlt.optim.adamw import AdamW
from mlt.optim.schedule import WarmupCosine
from mlt.train.distill import Distill

lizard = sibling(__file__, "families/lizard.py")
FIRST = ("*.mixer.query_map.kernel", "*.mixer.key_map.kernel", "*.mixer.decay.kernel", "*.mixer.sinks", "*.mixer.alpha")
SECOND = ("*.mixer.query.kernel", "*.mixer.key.kernel", "*.mixer.value.kernel")


def config(
    teacher: str = "runs/teacher",
    start: str | None = None,
    step: int | None = None,
    size: str = "small",
    steps: int | None = None,
) -> RunConfig:
    """`teacher` and `start` are run directories; with `start` this is the second stage, and without it the first."""
    steps = steps or (200 if size == "small" else 1220)
    run = lizard.config(size=size, steps=steps, batch_size=None if size == "small" else 8)
    if start is None:
        distill = Distill(teacher=teacher, step=step, match="outputs", trained=FIRST)
    else:
        distill = Distill(teacher=teacher, step=step, match="logits", weight=0.0, start=start, trained=SECOND)
    optimizer = AdamW(learning_rate=1e-3 if start is None else 5e-4, beta2=0.99, weight_decay=0.0)
    schedule = WarmupCosine(warmup_steps=max(steps // 10, 1), final_fraction=0.1)
    return run.replace(train=run.train.replace(distill=distill), optimizer=optimizer, schedule=schedule)
