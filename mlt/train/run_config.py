"""The config of a run directory when a run is resumed: what may have changed, what may not, and a file that was damaged."""

import logging
import time
from typing import get_args

import jax

from mlt.checkpoint.layout import CheckpointError, committed_steps, read_meta
from mlt.config.dump import allowed_changes, binding_changes, config_hash, from_yaml, to_yaml
from mlt.config.run import RunConfig, TrainConfig
from mlt.errors import UserError
from mlt.run_paths import RunPaths, write_whole
from mlt.train.run_directory import RunDirectory

LOGGER = logging.getLogger("mlt.train")


def check_config(directory: RunDirectory, config: RunConfig) -> None:
    """Refuse a config that computes another run than the one in the directory. Writes nothing.

    A saved config that cannot be read, or was cut off, is no reason to refuse: see `_damaged`.

    Raises:
        UserError: the directory holds another run; the message shows the difference and how to go on.
    """
    text = to_yaml(config)
    if not _damaged(directory, config, text):
        directory.check_config(text, _binding)


def keep_config(directory: RunDirectory, config: RunConfig) -> list[str]:
    """Save the config where there is none, or where what is there may be replaced; gives the changes, a line each.

    What a directory holds is then always the config that its run went on with last; earlier ones can be told from
    `logs/config_changes.txt`. Only the first process writes.

    Raises:
        UserError: it cannot be written.
    """
    text = to_yaml(config)
    if not directory.config_path.exists():
        directory.write_config(text)
        return []
    if _damaged(directory, config, text):
        changes = [f"{directory.config_path} was damaged, and is written anew: this config is the one of the checkpoints"]
        LOGGER.warning("%s", changes[0])
    else:
        changes = allowed_changes(from_yaml(directory.config_path.read_text()), config)
    if changes and jax.process_index() == 0:
        try:
            write_whole(directory.config_path, text)
            directory.logs_path.mkdir(exist_ok=True)
            with (directory.logs_path / "config_changes.txt").open("a") as file:
                file.writelines(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}  {line}\n" for line in changes)
        except OSError as error:
            raise UserError(
                f"cannot write {directory.config_path}: {error.strerror}; free space, or change the rights"
            ) from error
    return changes


def accepted_hashes(config: RunConfig) -> set[str]:
    """The hashes of configs whose checkpoints a config may go on from: its own, or all that differ in the type of computation."""
    own = config.train.compute_dtype
    types = get_args(TrainConfig.model_fields["compute_dtype"].annotation) if config.checkpoint.change_dtype else (own,)
    return {config_hash(config.replace(train=config.train.replace(compute_dtype=kind))) for kind in types}


def _binding(saved: str, given: str) -> list[str]:
    return binding_changes(from_yaml(saved), from_yaml(given))


def _damaged(paths: RunPaths, config: RunConfig, text: str) -> bool:
    """Whether the saved config is not what a run wrote, while the one at hand is what it must have been.

    The newest checkpoint that can be read knows its config by its hash. Without a checkpoint there is nothing to lose, and
    a text that stops in the middle of a line of this very config is taken for a part of it.
    """
    try:
        saved = paths.config_path.read_bytes().decode(errors="replace")
    except OSError:
        return False  # absent, or no right to read it: not ours to mend
    if saved == text:
        return False
    known = _hash_of_checkpoints(paths)
    if known is None:
        return not saved.endswith("\n") and text.startswith(saved)
    if known not in accepted_hashes(config):
        return False
    try:
        from_yaml(saved)
    except UserError:
        return True
    return text.startswith(saved)


def _hash_of_checkpoints(paths: RunPaths) -> str | None:
    for step in reversed(committed_steps(paths.checkpoints_path)):
        try:
            return read_meta(paths.checkpoints_path, step).get("config_hash")
        except CheckpointError:
            continue
    return None
