"""Checkpoints as the loop meets them: which one a start goes on from, and what a save that fails costs."""

import functools
import time
from pathlib import Path
from typing import Any

import jax

from mlt.checkpoint.layout import CheckpointError
from mlt.checkpoint.leaves import flatten
from mlt.checkpoint.restore import CASTS, Restored
from mlt.checkpoint.save import Checkpointer
from mlt.config.dump import config_hash
from mlt.config.run import RunConfig
from mlt.errors import RunFailed, UserError
from mlt.train.checkpoints import note_durable
from mlt.train.distributed import anyone_says
from mlt.train.run_config import accepted_hashes
from mlt.train.services import Services
from mlt.train.skips import Course
from mlt.train.state import TrainState
from mlt.train.token_maps import check_token_maps

SAVE_RETRY_SECONDS = (2.0, 8.0)  # between attempts at the last save of a process


def restore_newest(services: Services, checkpointer: Checkpointer, abstract: TrainState) -> Restored | None:
    """The newest whole checkpoint, if there is one."""
    check_token_maps(checkpointer.directory, services.setup.specs, services.config.data.tokenizer)
    config = services.config
    restored = checkpointer.restore_latest(abstract, dtypes=accepted_types(config, abstract))
    if restored is None:
        return None
    saved = restored.meta["config_hash"]
    if saved not in accepted_hashes(config):
        raise UserError(
            f"{restored.source} was saved by a run of config {saved}, this one is {config_hash(config)}; give the config of that "
            "run, or another --run-dir (the folder below checkpoint.durable_path has its name)"
        )
    where = services.directory.checkpoints_path
    if Path(restored.source).parent != where.absolute():
        where = f"{restored.source}, the durable copy: {where} has nothing as new that is whole"
    services.console.say(f"resuming after step {restored.step} from {where}")
    return restored


def accepted_types(config: RunConfig, abstract: TrainState) -> dict[str, str] | None:
    """path -> type of every floating array that may have been saved in another one; None where none may."""
    if not config.checkpoint.change_dtype:
        return None
    return {path: str(leaf.dtype) for path, leaf in flatten(abstract).items() if str(leaf.dtype) in CASTS}


class Saver:
    """Saves the state of a run. A save that fails costs a checkpoint, not the run, unless it is the process's last."""

    def __init__(self, services: Services, checkpointer: Checkpointer) -> None:
        self._services, self._checkpointer = services, checkpointer
        self._saving = False  # whether a save was begun whose outcome is not known

    def persist(self, step: int, state: TrainState, data: dict[str, Any], course: Course, due: bool = False) -> None:
        """Save. The last save of a process is waited for, and tried again before the run fails for it.

        Args:
          step: how many steps made the state.
          state: what to save.
          data: the position in the data behind it.
          course: how the run came here.
          due: whether the evaluation of this step is still to be done.

        Raises:
          RunFailed: the last save could not be made.
        """
        services = self._services
        services.watchdog.progress(f"the checkpoint of step {step}")
        last = self._is_last(step)
        with services.goodput.during("checkpoint"):
            for pause in (*SAVE_RETRY_SECONDS, None):
                failure = None
                try:
                    self._save(step, state, data, course, due)
                    if last:
                        self._checkpointer.wait()
                except CheckpointError as error:
                    failure = error
                if not last or not anyone_says(failure is not None):
                    return
                failure = failure or "another process could not write its part, see its output"
                if pause is None:
                    saved = self._checkpointer.steps()
                    there = f"step {saved[-1]}, the newest" if saved else "the start: there is no checkpoint"
                    raise RunFailed(
                        f"step {step} could not be saved in {1 + len(SAVE_RETRY_SECONDS)} attempts, and the process ends here: "
                        f"{failure}. Then the same command goes on from {there} in {services.directory.checkpoints_path}"
                    )
                services.console.say(f"warning: {failure}; trying again in {pause:g} s")
                time.sleep(pause)

    def _save(self, step: int, state: TrainState, data: dict[str, Any], course: Course, due: bool) -> None:
        config, book = self._services.config, self._services.book
        meta = {
            "config_hash": config_hash(config),
            "tokens": step * self._services.setup.tokens_per_step,
            "mesh": config.mesh.shape(),
            "versions": {"jax": jax.__version__},
            "evaluation_due": due,
            **course.meta(),
        }
        last = self._is_last(step)
        # Within a row of skipped steps the way back to before them stays open.
        prune = not self._services.skips.in_a_row
        save = functools.partial(self._checkpointer.save, step, state, data=data, meta=meta, durable=last, prune=prune)
        # First the outcome of the save before this one, so that its failure does not cost this one as well.
        for call in (self._checkpointer.wait, save):
            try:
                call()
            except CheckpointError as error:
                # A full disk costs a checkpoint, not the run; the last one must be on the disk.
                book.raise_alarm("checkpoint_failures")
                self._saving = False
                if last:
                    raise
                self._services.console.say(f"warning: {error}")
            else:
                if self._saving and call is not save:
                    book.alarms.pop("alarm/checkpoint_failures", None)
                self._saving = call is save
        note_durable(self._checkpointer.durable_state, book.alarms)

    def _is_last(self, step: int) -> bool:
        return step == self._services.config.train.steps or self._services.stopping.name is not None
