"""`mlt eval`: a suite of questions to a run's checkpoint."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mlt.errors import UserError
from mlt.evals.long_mamba import LongMamba, calibrate
from mlt.evals.mixture import held_out
from mlt.evals.recall import RecallTask, accuracy
from mlt.parallel.rules import Rules
from mlt.train.load import load_model

RECALL = ((64, 4), (128, 8), (256, 16), (512, 64))
"""(tokens, pairs) of the rows: Zoology's second figure."""
BATCH_TOKENS = 8192
Say = Callable[[str], None]


def evaluate_run(
    run_dir: Path,
    suite: str,
    *,
    say: Say,
    rows: int,
    seed: int,
    step: int | None,
    long_mamba: int | None,
    memory: Path | None = None,
    shares: tuple[float, ...] = (),
) -> None:
    """Print what a suite finds of a run.

    Args:
        suite: a key of SUITES.
        rows: of each setting.
        seed: of the rows.
        step: checkpoint to use; None takes the newest.
        long_mamba: extend the Mamba layers of a model that was trained on rows of so many tokens (`long_mamba.py`).
        memory, shares: with held-out, the run of a memory and its shares of the mixture (`mixture.py`).

    Raises:
        UserError: no such suite, run or checkpoint, or an option is out of range.
    """
    if suite not in SUITES:
        raise UserError(f"--suite {suite}: there is no such suite; use {' or '.join(SUITES)}")
    if rows < 1:
        raise UserError(f"--rows {rows}: must be at least 1")
    if suite == "held-out":
        if long_mamba is not None:
            raise UserError("--long-mamba: is read with --suite recall alone")
        held_out(run_dir, say=say, rows=rows, step=step, memory=memory, shares=shares)
        return
    if memory is not None or shares:
        raise UserError("--memory and --share: are read with --suite held-out alone")
    recall(run_dir, say=say, rows=rows, seed=seed, step=step, long_mamba=long_mamba)


def recall(run_dir: Path, *, say: Say, rows: int, seed: int, step: int | None, long_mamba: int | None) -> None:
    """Accuracy of multi-query associative recall, over the ids of the run's tokenizer."""
    config, model, step = load_model(run_dir, step)
    ids = min(config.model.vocab_size, config.data.tokenizer.vocab_size)
    dtype, rules = jnp.dtype(config.train.compute_dtype), Rules(None)
    options = {"dtype": dtype, "remat": config.remat}
    say(f"recall (MQAR) of step {step}, {rows} rows a line, seed {seed}, chance {2 / ids:.4f}")
    say(f"{'tokens':>8} {'pairs':>6} {'accuracy':>9} {'+-':>6}")
    extension = None if long_mamba is None else LongMamba(train_length=long_mamba)
    steps = None
    for length, pairs in RECALL:
        if 2 * pairs + 2 > ids:
            say(f"{length:>8} {pairs:>6}   needs {2 * pairs + 2} token ids, the run has {ids}")
            continue
        task = RecallTask(length=length, pairs=pairs, vocab_size=ids, filler="random")
        if extension is not None and steps is None:
            calibration = task.replace(length=max(extension.train_length + extension.train_length % 2, 4 * pairs))
            steps = calibrate(model, calibration.rows(seed, "train", range(4)), rules, **options)
        asked = model if extension is None or steps is None else extension.extend(model, steps, length)
        score, batch = accuracy(pairs, rules, **options), max(BATCH_TOKENS // length, 1)
        parts = [task.rows(seed, "test", range(at, min(at + batch, rows))) for at in range(0, rows, batch)]
        found = [float(score(asked, part)) for part in parts]
        share = float(np.average(found, weights=[len(part["tokens"]) for part in parts]))
        error = (share * (1 - share) / (rows * pairs)) ** 0.5
        say(f"{length:>8} {pairs:>6} {share:>9.4f} {error:>6.4f}")


SUITES = ("recall", "held-out")
"""Names that `mlt eval --suite` takes."""
