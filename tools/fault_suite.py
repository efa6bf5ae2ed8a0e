"""Randomized faults against a small run: kills, signals, damaged files, full and read-only disks.

    python tools/fault_suite.py [--trials 200] [--seed 0] [--out DIR]

Each trial trains the run of tests/faults/tiny.py in a directory of its own, breaks something at a random moment, now and
then breaks something else after the restart, and starts the same command again until it completes. It must end with the
state, data position and logged numbers of the uninterrupted run, to the bit; resume no earlier than after the newest
committed and undamaged checkpoint; and leave a directory that is whole and unlocked. Exit code 1 where one does not.

The seed draws the faults; the exact moment in which one strikes is the machine's. Full and read-only disks take the right
to mount file systems; without it these kinds are left out, and the table says so.
"""

import argparse
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "faults"))
os.environ["JAX_PLATFORMS"] = "cpu"

import fault_kinds  # noqa: E402
from fault_trials import KINDS, MOUNTING, TINY, WORDS, Outcome, Whole, run_trial  # noqa: E402
from fork_server import ForkServer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

TRIALS_PER_SERVER = 25  # a new one has another hash seed, and hides no leak from child to child


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="where failed trials are kept; a temporary directory by default")
    words = parser.parse_args()
    place = words.out or pathlib.Path(tempfile.mkdtemp(prefix="mlt-faults-"))
    outcomes, skipped = suite(place, words.trials, words.seed, say=lambda text: print(text, flush=True))
    Console(width=110).print(table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.failures]
    if skipped:
        print(f"left out, for want of the right to mount a file system: {', '.join(skipped)}")
    double = sum(outcome.faults > 1 for outcome in outcomes)
    left = sum(outcome.leftovers > 0 for outcome in outcomes)
    print(f"two faults in {double} trials; what a failed save left lies beside the checkpoints after {left}")
    print(f"{len(outcomes)} trials, seed {words.seed}: {len(failed)} failed" + (f"; kept in {place}" if failed else ""))
    sys.exit(1 if failed else 0)


def suite(place: pathlib.Path, trials: int, seed: int, *, say=lambda text: None) -> tuple[list[Outcome], list[str]]:
    """(what each trial showed, kinds that were left out)."""
    place.mkdir(parents=True, exist_ok=True)
    whole = uninterrupted(place)
    mounts = fault_kinds.can_mount(place)
    kinds = [name for name in KINDS if mounts or name not in MOUNTING]
    environment = _environment() | {
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    outcomes: list[Outcome] = []
    server: ForkServer | None = None
    try:
        for number, kind in zip(range(trials), itertools.cycle(kinds), strict=False):
            if number % TRIALS_PER_SERVER == 0:
                if server is not None:
                    server.close()
                server = ForkServer(environment)
            assert server is not None
            outcome = run_trial(server, place / f"trial-{number}", whole, seed, number, kind, mounts=mounts)
            outcomes.append(outcome)
            say(f"{number + 1:4} {outcome.seconds:5.1f} s  {'; '.join(outcome.story)}")
            for failure in outcome.failures:
                say(f"     FAILED: {failure}")
    finally:
        if server is not None:
            server.close()
    return outcomes, [name for name in KINDS if name not in kinds]


def uninterrupted(place: pathlib.Path) -> Whole:
    """The run by the plain command, in a process of its own and without a compilation cache."""
    run_dir = place / f"whole-{time.time_ns()}"
    line = [sys.executable, "-m", "mlt.cli", "train", str(TINY), "--run-dir", str(run_dir), *WORDS]
    done = subprocess.run(line, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the uninterrupted run failed:\n{done.stdout}{done.stderr}")
    return Whole.of(run_dir)


def _environment() -> dict[str, str]:
    taken = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    return {name: value for name, value in os.environ.items() if name not in taken} | {"JAX_PLATFORMS": "cpu"}


def table(outcomes: list[Outcome]) -> Table:
    found = Table(title="faults and what became of the run")
    for name in ("fault", "trials", "faults", "hit", "same end", "resumes", "steps redone: mean", "most", "s of CPU"):
        found.add_column(name, justify="left" if name == "fault" else "right")
    for kind in [*KINDS, None]:
        these = [outcome for outcome in outcomes if kind in (None, outcome.kind)]
        if not these:
            continue
        lost = [steps for outcome in these for steps in outcome.lost]
        mean = sum(lost) / max(len(lost), 1)
        sound = sum(not outcome.failures for outcome in these)
        counts = (len(these), sum(o.faults for o in these), sum(o.hits for o in these), sound, len(lost))
        seconds = sum(outcome.seconds for outcome in these) / len(these)
        words = (kind or "all", *map(str, counts), f"{mean:.1f}", str(max(lost, default=0)), f"{seconds:.1f}")
        found.add_row(*words, end_section=kind == next(reversed(KINDS)))
    return found


if __name__ == "__main__":
    main()
