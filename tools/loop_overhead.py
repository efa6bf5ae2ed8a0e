"""What the training loop costs beside the compiled step: data, metrics, progress and saves together.

    python tools/loop_overhead.py [CONFIG] [--rounds 5]

Alternates the bare compiled step with the real loop over the very same batches, in one process on the same program (how
long a step takes depends on how documents lie in its rows), and prints the
median of the rounds' ratios. Evaluation and samples are left out: they are work asked for, not overhead.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import jax

from mlt.checkpoint.save import Checkpointer
from mlt.config.load import load_config
from mlt.config.run import RunConfig
from mlt.data.loader import open_loader
from mlt.parallel.rules import Rules
from mlt.report.console import RunConsole
from mlt.report.sinks import open_sinks
from mlt.train.loop import Loop
from mlt.train.run_directory import RunDirectory
from mlt.train.saving import Saver
from mlt.train.setup import prepare
from mlt.train.signals import StopRequest
from mlt.train.state import abstract_state, create_state

ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs" / "quickstart.py"))
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind")
    words = parser.parse_args()
    quiet = [f"evaluation.every_steps={10**9}", "sample.tokens=0", f"train.steps={10**6}"]
    config = load_config(words.config, sets=quiet, root=RunConfig)
    bare, looped = measure(config, words.rounds)
    print(f"bare step      median {1e3 * statistics.median(bare):8.1f} ms   {_shown(bare)}")
    print(f"step in loop   median {1e3 * statistics.median(looped):8.1f} ms   {_shown(looped)}")
    ratios = [loop / step for step, loop in zip(bare, looped, strict=True)]
    print(f"overhead of the loop: {100 * (statistics.median(ratios) - 1):+.1f} % (median of the rounds' ratios)")


def measure(config: RunConfig, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds per step of each round: (bare, in the loop). A round is one checkpoint interval, its save included."""
    steps = config.checkpoint.every_steps
    setup = prepare(config, Rules(config.mesh.build()))
    abstract = abstract_state(setup.specs, setup.optimizer, setup.rules)
    bare, looped = [], []
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        directory = RunDirectory(pathlib.Path(folder) / "run")
        with directory.lock(), Checkpointer(directory.checkpoints_path, keep=1) as checkpointer:
            loop = Loop(setup, directory, RunConsole(config.train.steps), stop)
            loop.saver = Saver(loop.services, checkpointer)
            loop.compile_evaluation = lambda: None
            step_fn = loop.compile_step(abstract)
            state = create_state(setup.specs, setup.optimizer, setup.rules, 0)
            done = steps // 2  # a save falls into the middle of each round, and its writing into the same round
            for _ in range(rounds + 1):
                ahead = open_loader(config.data, setup.corpus, first_step=done)
                batches = [loop.feed(next(ahead)) for _ in range(steps)]
                ahead.close()
                started = time.perf_counter()
                for batch in batches:
                    state, metrics = step_fn(state, batch)
                jax.block_until_ready((state, metrics))
                bare.append((time.perf_counter() - started) / steps)
                # Only the last step of the run is evaluated: stop short of it, as a running job does.
                with open_sinks(config.log, directory, done) as sinks:
                    loop.sinks = sinks
                    loader = open_loader(config.data, setup.corpus, first_step=done)
                    started = time.perf_counter()
                    state = loop.steps(step_fn, state, done, done + steps, loader)
                    jax.block_until_ready(state)
                    looped.append((time.perf_counter() - started) / steps)
                done += steps
    return bare[1:], looped[1:]


def _shown(seconds: list[float]) -> str:
    return "  ".join(f"{1e3 * s:.1f}" for s in seconds)


if __name__ == "__main__":
    main()
