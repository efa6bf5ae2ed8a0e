"""Whether to start a run again, from the code it ended with. Also a command, for job scripts:

    python -m mlt.launch.restarts RUN_DIR --code 70 --restarts 4 --max-restarts 100 --max-losses 3

prints why and exits with 0 where the run is to be started again, with 1 where not.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import PurePath

from mlt.errors import EXIT_FAILED, EXIT_LOST, EXIT_PREEMPTED, EXIT_USER
from mlt.launch.paths import LaunchPaths
from mlt.run_paths import write_whole


@dataclasses.dataclass(frozen=True)
class Decision:
    """Attributes:
    again: start the run again.
    text: why, or why not.
    """

    again: bool
    text: str


def lost(code: int) -> bool:
    """Whether a process ended because of something around it: a lost peer, a hang, or a signal that killed it."""
    return code == EXIT_LOST or code < 0 or code > 128


def combined(codes: Sequence[int]) -> int:
    """The code of a run whose processes ended with these: the one that decides what comes next."""
    for code in (EXIT_USER, EXIT_FAILED):
        if code in codes:
            return code
    if any(map(lost, codes)):
        return EXIT_LOST
    if EXIT_PREEMPTED in codes:
        return EXIT_PREEMPTED
    return max(codes, key=abs)


def decide(run_dir: PurePath, code: int, *, restarts: int, max_restarts: int, max_losses: int) -> Decision:
    """What to do after a run ended with `code`. Counts lost processes in the run directory, where that can be written.

    Args:
        run_dir: of the run.
        code: its exit code; above 128 or below 0, it was killed by a signal.
        restarts: how often it was started again before.
        max_restarts: how often it may be.
        max_losses: how often in a row after a lost process, with no newer checkpoint between them.
    """
    if code == 0:
        return Decision(False, "the run is complete")
    if code != EXIT_PREEMPTED and not lost(code):
        why = "its input is wrong" if code == EXIT_USER else "it failed by itself"
        return Decision(False, f"ended with {code}: {why}; a restart would end the same way")
    if restarts >= max_restarts:
        return Decision(False, f"ended with {code} after {restarts} restarts, and max_restarts is {max_restarts}")
    if code == EXIT_PREEMPTED:
        return Decision(True, f"was asked to stop and saved its state: restart {restarts + 1}")
    paths = LaunchPaths(run_dir)
    step = newest_step(paths)
    losses = _losses(paths, step) + 1
    since = f"with no checkpoint newer than that of step {step}" if step else "before the first checkpoint"
    try:
        paths.path.mkdir(parents=True, exist_ok=True)
        write_whole(paths.losses_path, json.dumps({"step": step, "losses": losses}))
    except OSError as error:  # a full disk is no reason to leave the run where it is; max_restarts bounds it still
        since += f" (not counted: {paths.losses_path} cannot be written: {error.strerror})"
    if losses > max_losses:
        return Decision(False, f"lost a process {losses} times in a row {since}, and max_losses is {max_losses}")
    return Decision(True, f"lost a process (code {code}), the {_nth(losses)} time {since}: restart {restarts + 1}")


def newest_step(paths: LaunchPaths) -> int:
    """Of the checkpoints that were written to the end; 0 where there is none."""
    folder = paths.run.checkpoints_path
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def _losses(paths: LaunchPaths, step: int) -> int:
    try:
        saved = json.loads(paths.losses_path.read_text())
        return int(saved["losses"]) if saved["step"] == step else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _nth(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mlt.launch.restarts", description="Decide on a restart of a run.")
    parser.add_argument("run_dir", type=PurePath)
    for name in ("code", "restarts", "max-restarts", "max-losses"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = vars(parser.parse_args(words))
    decision = decide(given.pop("run_dir"), given.pop("code"), **given)
    print(f"mlt: {decision.text}", flush=True)
    return 0 if decision.again else 1


if __name__ == "__main__":
    sys.exit(main())
