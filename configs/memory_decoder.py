"""Memory Decoder (arXiv 2508.09874): a small transformer learns what a datastore of a larger model would say of a domain.

    mlt train configs/families/transformer.py --run-dir runs/base
    python tools/datastore.py build runs/base runs/store --data configs/memory_decoder.py
    python tools/datastore.py search runs/store runs/targets --neighbours 128 --temperature 16
    mlt train configs/memory_decoder.py --arg targets=runs/targets --run-dir runs/memory
    mlt eval runs/base --suite held-out --memory runs/memory

The loss is 0.5 KL(p_kNN | p) + 0.5 cross-entropy. The memory is trained once and stands beside any model of its tokenizer.
Published: keys of GPT-2 XL, the last layer's; 1024 neighbours found by a quantised index (here all are compared), temperature
16, rate 1e-3 falling linearly, 16 rows by 4 micro-batches, up to 70 epochs. Widths of the memory are ours: our sources name
none. The domain is made-up text that the base model has not seen; give `data` of your own. Without `targets` the same model
learns from the data alone.
"""

from mlt.config.load import sibling
from mlt.config.run import CheckpointConfig, EvalConfig, RunConfig, SampleConfig, TrainConfig
from mlt.data.loader import DataConfig
from mlt.data.neighbours import Neighbours
from mlt.data.synthetic import SyntheticText
from mlt.data.tokenize import ByteTokenizer
from mlt.model.remat import Remat
from mlt.optim.adamw import AdamW
from mlt.optim.schedule import WarmupStableDecay
from mlt.report.sinks import LogConfig

transformer = sibling(__file__, "families/transformer.py")


def domain(targets: str | None, batch_size: int = 4, sequence_length: int = 256) -> DataConfig:
    """Documents of the domain, and where there are any, their targets."""
    return DataConfig(
        source=SyntheticText(num_documents=40, mean_words=150),
        tokenizer=ByteTokenizer(),
        sequence_length=sequence_length,
        batch_size=batch_size,
        validation_fraction=0.2,
        neighbours=None if targets is None else Neighbours.of(targets),
    )


def config(targets: str | None = None, weight: float = 0.5, steps: int = 200) -> RunConfig:
    """`targets` is a folder of tools/datastore.py, `weight` the share of its divergence in the loss."""
    return RunConfig(
        model=transformer.model(64, 2, transformer.SMALL, 176, transformer.family.VOCAB),
        data=domain(targets),
        train=TrainConfig(steps=steps, compute_dtype="float32", neighbour_weight=None if targets is None else weight),
        optimizer=AdamW(learning_rate=3e-3),
        schedule=WarmupStableDecay(warmup_steps=20, decay_steps=max(steps - 20, 1)),
        remat=Remat(mode="none"),
        checkpoint=CheckpointConfig(every_steps=100),
        evaluation=EvalConfig(every_steps=100),
        sample=SampleConfig(prompt="the ", tokens=100),
        log=LogConfig(every_steps=5),
    )
