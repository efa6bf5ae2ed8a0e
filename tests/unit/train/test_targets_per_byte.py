"""Bits per byte on the screen: as many targets for a byte as the rows of the mixture have."""

from typing import Any

import pytest

from mlt.config.run import RunConfig, TrainConfig
from mlt.data.loader import DataConfig, TrainingRows, load_corpus
from mlt.data.mixture import Mixture, Stage, Weighted
from mlt.data.text_files import TextFiles
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.train.setup import Setup

NOTHING: Any = None
MODEL = LMConfig(d_model=8, vocab_size=272, stack=Stack(period=(Block(mixers=(SwiGLU(d_ff=8),)),), repeats=1))


def test_it_is_that_of_the_rows_at_every_stage(tmp_path):
    for name, length in (("short", 4), ("long", 400)):
        (tmp_path / name).mkdir()
        for number in range(40):
            (tmp_path / name / f"{number}.txt").write_text(f"{number:04}" * (length // 4))
    parts = tuple(
        Weighted(source=TextFiles(paths=(str(tmp_path / name),)), weight=weight)
        for name, weight in (("short", 3.0), ("long", 1.0))
    )
    mixture = Mixture(parts=parts, stages=(Stage(from_row=1000, weights=(0.0, 1.0)),))
    data = DataConfig(source=mixture, sequence_length=64, batch_size=1, shuffle_block_rows=1)
    corpus = load_corpus(data)
    setup = Setup(RunConfig(model=MODEL, data=data, train=TrainConfig(steps=1)), NOTHING, corpus, NOTHING, NOTHING, NOTHING)
    rows, token_bytes = TrainingRows(data, corpus), data.tokenizer.token_bytes()
    for first in (0, 1000):
        targets = rows.batch(range(first, first + 1000))["targets"]
        assert setup.targets_per_byte(first) == pytest.approx(targets.size / token_bytes[targets].sum(), rel=0.01)
        assert setup.targets_per_byte(first + 999) == setup.targets_per_byte(first)
