"""What the families share: how a size becomes a run, and the defaults of data and training.

A family file has `PAPER`, `SIZES` and `config = family.runs(SIZES)`. Its size "small" trains on a CPU in minutes; the others
are published ones. They read the same local text until a run names its own `data`: their vocabulary has room for any tokenizer.
"""

import dataclasses
from collections.abc import Callable, Mapping

from mlt.config.run import CheckpointConfig, EvalConfig, RunConfig, SampleConfig, TrainConfig
from mlt.data.loader import DataConfig
from mlt.data.stdlib_source import PythonStdlib
from mlt.data.tokenize import ByteTokenizer
from mlt.errors import UserError
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.optim.adamw import AdamW
from mlt.optim.schedule import WarmupCosine
from mlt.optim.table import TableOptimizer
from mlt.report.sinks import LogConfig

VOCAB = 272
"""Rows of the small models' embeddings: a byte tokenizer's."""

PAD = 258
"""Its padding."""


@dataclasses.dataclass(frozen=True)
class Size:
    """One size of a family.

    Attributes:
        model: what is trained.
        published: parameters as its source states them, such as "2.7B"; None where it states none.
        note: why our count differs from that, or what of the model is our choice.
        learning_rate: peak rate.
        context: tokens of a row.
        rows: rows of a batch.
        tables: optimizers of sparse tables; without, they are trained as everything else is, at five times the rate.
    """

    model: LMConfig
    published: str | None = None
    note: str = ""
    learning_rate: float = 4e-4
    context: int = 4096
    rows: int = 128
    tables: TableOptimizer | tuple[TableOptimizer, ...] | None = None


def released_balance(coefficient: float, experts_per_token: int, layers: int) -> float:
    """`MoE.global_balance_loss` of a model whose released file has this `router_aux_loss_coef`.

    Theirs weighs one value over the tokens of all layers joined, which is `experts_per_token` under an even load; ours one value
    of each layer, which is 1 then.
    """
    return coefficient * experts_per_token / layers


def runs(sizes: Mapping[str, Size]) -> Callable[..., RunConfig]:
    """The function `config` of a family."""

    def config(
        size: str = "small", steps: int | None = None, sequence_length: int | None = None, batch_size: int | None = None
    ) -> RunConfig:
        if size not in sizes:
            raise UserError(f"--arg size={size}: this family has the sizes {', '.join(sizes)}")
        chosen = sizes[size]
        make = _small if size == "small" else _published
        return make(chosen, steps, sequence_length, batch_size)

    return config


def _small(size: Size, steps: int | None, sequence_length: int | None, batch_size: int | None) -> RunConfig:
    return RunConfig(
        model=size.model,
        data=_data(_given(sequence_length, 256), _given(batch_size, 4)),
        train=TrainConfig(steps=_given(steps, 200), compute_dtype="float32"),
        optimizer=AdamW(learning_rate=3e-3, tables=size.tables),
        schedule=WarmupCosine(warmup_steps=20),
        remat=Remat(mode="none"),
        checkpoint=CheckpointConfig(every_steps=100),
        evaluation=EvalConfig(every_steps=100, max_rows=64),
        sample=SampleConfig(prompt="def ", tokens=200),
        log=LogConfig(every_steps=5),
    )


def _published(size: Size, steps: int | None, sequence_length: int | None, batch_size: int | None) -> RunConfig:
    return RunConfig(
        model=size.model,
        data=_data(_given(sequence_length, size.context), _given(batch_size, size.rows)),
        train=TrainConfig(steps=_given(steps, 100_000)),
        optimizer=AdamW(learning_rate=size.learning_rate, tables=size.tables),
        schedule=WarmupCosine(warmup_steps=2000),
    )


def _data(sequence_length: int, batch_size: int) -> DataConfig:
    return DataConfig(source=PythonStdlib(), tokenizer=ByteTokenizer(), sequence_length=sequence_length, batch_size=batch_size)


def _given(value: int | None, default: int) -> int:
    """The value if there is one. A 0 is one, and the config's rules refuse it."""
    return default if value is None else value
