"""The score of held-out text with the generic block, beside that with the blocks of its clusters."""

import dataclasses

import jax
import numpy as np
import pytest

from mlt.config.load import load_config
from mlt.data.cluster_rows import FIELD, Clusters
from mlt.data.synthetic import SyntheticText
from mlt.loss import token_losses
from mlt.mixers.channel.hierarchical_memory import HierarchicalMemory
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.parallel.mesh import Layout
from mlt.train.clusters import cluster_problems
from mlt.train.evaluate import EvalResult, Evaluator
from mlt.train.setup import prepare
from mlt.verify.material import lively

MEMORY = HierarchicalMemory(d_ff=8, units=(3, 2), branching=3, max_runs=6)


def test_both_scores_are_of_the_same_tokens():
    config = load_config("tests/faults/tiny.py")
    data = config.data.replace(
        source=SyntheticText(num_documents=60, mean_words=8), batch_size=2, sequence_length=64, validation_fraction=0.1
    )
    config = config.replace(
        model=LMConfig(d_model=8, vocab_size=272, stack=Stack(head=(Block(mixers=(MEMORY,)),))),
        data=data.replace(clusters=Clusters(branching=3, depth=2, max_runs=6, width=16)),
        evaluation=config.evaluation.replace(generic=True, max_rows=3),
    )
    assert not list(cluster_problems(config))
    setup = prepare(config, Layout().rules(jax.devices()[:1]))
    model = lively(setup.fresh_state().model, 0, std=0.5)
    evaluator = Evaluator(setup)
    calls = []
    result = evaluator(model, lambda: calls.append(1))
    assert len(calls) == 2 * len(evaluator.batches)
    assert evaluator.batches[0] is not evaluator.batches[0], "held-out rows stay in memory"

    options = {"dtype": setup.options.dtype, "remat": setup.options.remat}
    losses_of = jax.jit(lambda model, batch: token_losses(model, batch, setup.rules, **options)[0])

    def score(generic: bool) -> float:
        nats, weight = 0.0, 0.0
        for batch in evaluator.batches:
            assert len(np.unique(batch[FIELD][batch["segment_ids"] > 0])) > 1
            given = {**batch, FIELD: np.full_like(batch[FIELD], -1)} if generic else batch
            nats, weight = nats + float(losses_of(model, given).sum()), weight + float(batch["weights"].sum())
        return nats / weight

    assert result.loss == pytest.approx(score(False), rel=1e-5)
    assert result.generic.loss == pytest.approx(score(True), rel=1e-5)
    assert abs(result.generic.loss - result.loss) > 1e-3
    assert result.generic.tokens == result.tokens
    assert result.generic.bits_per_byte / result.bits_per_byte == pytest.approx(result.generic.loss / result.loss)
    metrics = result.metrics()
    assert metrics["eval/generic_loss"] == result.generic.loss
    assert metrics["eval/generic_bits_per_byte"] == result.generic.bits_per_byte
    assert metrics["eval/loss"] == result.loss
    assert list(dataclasses.replace(result, generic=None).metrics()) == ["eval/loss", "eval/bits_per_byte", "eval/tokens"]
    assert EvalResult(1.0, 2.0, 3).generic is None


def test_a_generic_score_needs_clusters():
    config = load_config("configs/families/lave.py")
    config = config.replace(evaluation=config.evaluation.replace(generic=True))
    assert [problem.path for problem in cluster_problems(config)] == ["evaluation.generic"]
