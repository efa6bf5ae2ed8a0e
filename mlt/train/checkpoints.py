"""The checkpoints of a run: where its config says they go, and what its metrics say about them."""

from mlt.checkpoint.copier import CopyState, DurableOptions
from mlt.checkpoint.save import Checkpointer
from mlt.config.run import CheckpointConfig
from mlt.run_paths import RunPaths

_FAILURES, _STEP = "alarm/durable_failures", "checkpoint/durable_step"


def open_checkpointer(config: CheckpointConfig, paths: RunPaths) -> Checkpointer:
    """The writer of a run's checkpoints, both levels. Nothing is made or read yet."""
    durable = None
    if config.durable_path is not None:
        durable = DurableOptions(
            f"{config.durable_path.rstrip('/')}/{paths.path.absolute().name}",
            config.durable_every_steps or config.every_steps,
            keep=config.durable_keep,
            keep_every_steps=config.durable_keep_every_steps,
            wait_seconds=config.durable_wait_seconds,
        )
    return Checkpointer(paths.checkpoints_path, keep=config.keep, keep_every_steps=config.keep_every_steps, durable=durable)


def note_durable(state: CopyState | None, alarms: dict[str, int]) -> None:
    """Put into the metrics of the next rows how the durable copies fare: the newest, and failures while they last."""
    if state is None:
        return
    alarms.pop(_FAILURES, None)
    if state.failing:
        alarms[_FAILURES] = state.failures
    if state.step is not None:
        alarms[_STEP] = state.step
