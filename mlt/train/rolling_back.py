"""Going back to a checkpoint after too many skipped steps in a row (`mlt.train.skips` says when)."""

import contextlib

from mlt.checkpoint.layout import CheckpointError
from mlt.checkpoint.save import Checkpointer
from mlt.errors import RunFailed
from mlt.report.sinks import MetricSinks, truncate_rows
from mlt.train.distributed import first_says
from mlt.train.saving import accepted_types
from mlt.train.services import Services
from mlt.train.skips import Course, RollBack, way_back
from mlt.train.state import TrainState

_START, _NOWHERE = -2, -1


def roll_back(
    asked: RollBack,
    course: Course,
    services: Services,
    checkpointer: Checkpointer,
    abstract: TrainState,
    sinks: MetricSinks,
) -> tuple[TrainState, int, Course]:
    """(state, step, course) to go on from; the data goes on behind the skipped steps, at `asked.position`.

    Raises:
        RunFailed: there is no way back, or it was gone too often.
    """
    services.watchdog.progress(f"the rollback from step {asked.last}")
    config, setup, advice = services.config, services.setup, services.skips.advice
    guard, last, first = config.train.guard, asked.last, asked.first
    what = f"steps {first} to {last} were skipped, {guard.max_consecutive_skips} in a row"
    if len(course.rollbacks) >= guard.max_rollbacks:
        raise RunFailed(f"{what}, after {guard.max_rollbacks} rollbacks (train.guard.max_rollbacks). {advice}")
    with services.goodput.during("startup"):
        with contextlib.suppress(CheckpointError):
            checkpointer.wait()
        to = first_says(_target(checkpointer, course, first, config.checkpoint.every_steps))
        try:
            if to >= 0:
                state = checkpointer.restore(abstract, step=to, dtypes=accepted_types(config, abstract)).state
            elif to == _START:
                to = 0
                state = setup.fresh_state()
            else:
                raise RunFailed(f"{what}, and no checkpoint from before them is left to go back to. {advice}")
            checkpointer.discard_after(to)
        except CheckpointError as error:
            raise RunFailed(f"{what}, and the way back failed: {error}. {advice}") from error
    sinks.rewind(to, {"from_step": last, "first_skipped": first})
    if services.peers.index == 0:
        with services.book.tolerating("samples"):
            truncate_rows(services.directory.samples_path, to)
    services.goodput.rolled_back(last, to)
    services.console.say(f"{what}: going back to step {to}, and on with the data behind step {last}")
    return state, to, course.back(asked, to)


def _target(checkpointer: Checkpointer, course: Course, first: int, every: int) -> int:
    """The step to go back to, of either level; `_START` where the run has saved none before `first`, or `_NOWHERE`.

    A run that has saved one and lost it does not begin again: that would be weeks of work for a few bad batches.
    """
    try:
        steps = checkpointer.steps_anywhere()
    except OSError:
        return way_back(checkpointer.steps(), first, every)
    to = way_back(steps, first, every)
    if to == _NOWHERE and course.from_seed and (not steps or first <= every):
        return _START
    return to
