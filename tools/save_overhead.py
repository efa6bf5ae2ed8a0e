"""What saving costs a run: step time with a save every 20 steps against never saving, in one process.

    python tools/save_overhead.py [CONFIG] [--arg NAME=VALUE] [--rounds 12] [--interval 20] [--durable]

A round is one interval: the same batches through the same compiled step, once with a save at its first step (whose writing
then goes on beside the other steps) and once without, in turns. Prints the median over rounds of the ratio of their times,
everything a save does included, and the ratio of the median steps, and exits with 1 where either is 1.05 or more.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

import jax

from mlt.checkpoint.copier import DurableOptions
from mlt.checkpoint.save import Checkpointer
from mlt.config.load import load_config
from mlt.config.run import RunConfig
from mlt.data.loader import open_loader
from mlt.parallel.rules import Rules
from mlt.train.evaluate import Evaluator
from mlt.train.setup import prepare
from mlt.train.state import abstract_batch, abstract_state, create_state
from mlt.train.step import jit_train_step

ROOT = pathlib.Path(__file__).parent.parent
LIMIT = 1.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs" / "quickstart.py"))
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="argument of the config function")
    parser.add_argument("--rounds", type=int, default=12, help="pairs of rounds")
    parser.add_argument("--interval", type=int, default=20, help="steps from save to save")
    parser.add_argument("--durable", action="store_true", help="copy every checkpoint to a second directory as well")
    words = parser.parse_args()
    config = load_config(words.config, args=words.arg, root=RunConfig)
    plain, saving, blocked = measure(config, words.rounds, words.interval, durable=words.durable)
    ratios = [sum(with_save) / sum(without) for with_save, without in zip(saving, plain, strict=True)]
    steps = [statistics.median(step for a_round in rounds for step in a_round) for rounds in (plain, saving)]
    means = [statistics.median(sum(a_round) for a_round in rounds) / words.interval for rounds in (plain, saving)]
    whole, median = statistics.median(ratios), steps[1] / steps[0]
    for label, step, mean in zip(("never saving", f"a save every {words.interval} steps"), steps, means, strict=True):
        print(f"{label:24} median step {1e3 * step:7.1f} ms   mean step of a round {1e3 * mean:7.1f} ms")
    print(f"save() keeps the loop for {1e3 * statistics.median(blocked):.1f} ms (median of {len(blocked)})")
    print(f"rounds {'  '.join(f'{ratio:.3f}' for ratio in ratios)}")
    print(f"ratio of whole rounds {whole:.3f} (median), of median steps {median:.3f}; must be below {LIMIT}")
    return int(max(whole, median) >= LIMIT)


def measure(
    config: RunConfig, rounds: int, interval: int, *, durable: bool
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """(seconds of each step of each round without a save, with one, seconds that each save kept the loop)."""
    setup = prepare(config, Rules(config.mesh.build()))
    abstract = abstract_state(setup.specs, setup.optimizer, setup.rules)
    shapes = abstract_batch(setup.rules, config.data.batch_size, config.data.sequence_length)
    step_fn = jit_train_step(abstract, setup.optimizer, setup.options).lower(abstract, shapes).compile()
    state = create_state(setup.specs, setup.optimizer, setup.rules, config.train.seed)
    feed = Evaluator(setup).feed
    loader = open_loader(config.data, setup.corpus, places=feed.places)
    batches = [feed(next(loader)) for _ in range(interval)]
    position = loader.state()
    loader.close()
    plain, saving, blocked = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        second = DurableOptions(pathlib.Path(folder) / "durable", interval) if durable else None
        with Checkpointer(pathlib.Path(folder) / "checkpoints", durable=second) as checkpointer:
            done = 0
            for number in range(rounds + 1):
                for saves in ((False, True), (True, False))[number % 2]:
                    seconds = []
                    for index, batch in enumerate(batches):
                        started = time.perf_counter()
                        state, metrics = step_fn(state, batch)
                        jax.block_until_ready(metrics)
                        if saves and index == 0:
                            done += interval
                            checkpointer.save(done, state, data=position, meta={"config_hash": ""})
                            blocked.append(checkpointer.last_blocked_seconds)
                        seconds.append(time.perf_counter() - started)
                    checkpointer.wait()
                    (saving if saves else plain).append(seconds)
    return plain[1:], saving[1:], blocked[1:]


if __name__ == "__main__":
    sys.exit(main())
