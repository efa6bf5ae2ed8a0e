"""Train small models on multi-query associative recall and print how much each recalls (docs/recall.md).

    python tools/recall_table.py [--mixers attention,gated_delta,mamba2,gla] [--seeds 0,1,2] [--steps 600]

trains a short convolution followed by one mixer, with the project's own model, optimizer and train step, at each learning rate
with the first seed, and at the best of them with the other seeds. It prints accuracy on rows that no training saw. A run ends
early when it recalls 99.5 % of them. Some minutes a mixer on two cores.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mlt.evals.recall import RecallTask, accuracy
from mlt.mixers.base import SequenceMixerConfig
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.delta_net import DeltaNet
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.mixers.sequence.gated_linear_attention import GatedLinearAttention
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.short_conv import ShortConv
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import partition
from mlt.optim.adamw import AdamW
from mlt.optim.schedule import WarmupCosine
from mlt.parallel.mesh import Layout
from mlt.train.state import abstract_state, create_state
from mlt.train.step import StepOptions, jit_train_step

TRAIN_ROWS = 100_000
ENOUGH = 0.995


def contestants(width: int, head: int) -> dict[str, SequenceMixerConfig]:
    """The mixers. Recurrent ones have a matrix state of width * head values."""
    heads = width // head
    return {
        "attention": Attention(num_heads=1, head_dim=width),
        "gated_delta": GatedDelta(num_heads=heads, key_dim=head, value_dim=head),
        "delta_net": DeltaNet(num_heads=heads, key_dim=head, value_dim=head),
        "mamba2": Mamba2(num_heads=2 * heads, head_dim=head, state_dim=head // 2),
        "gla": GatedLinearAttention(num_heads=heads, key_dim=head, value_dim=head),
    }


@dataclasses.dataclass(frozen=True)
class Training:
    """Attributes:
    task: what is learnt.
    config: the model.
    steps: optimizer steps at most.
    batch: rows a step.
    test_rows: rows that accuracy is measured on.
    """

    task: RecallTask
    config: LMConfig
    steps: int
    batch: int
    test_rows: int

    def run(self, rate: float, seed: int, say: Callable[[str], None]) -> float:
        """Accuracy on the test rows after training at a peak learning rate."""
        specs, rules = self.config.build(), Layout().rules(jax.devices()[:1])
        schedule = WarmupCosine(warmup_steps=self.steps // 10, final_fraction=0.01)
        optimizer = AdamW(learning_rate=rate).build(partition(specs)[0], schedule, self.steps)
        options = StepOptions(rules=rules, remat=Remat(mode="none"), dtype=jnp.dtype("float32"))
        step = jit_train_step(abstract_state(specs, optimizer, rules), optimizer, options)
        score = accuracy(self.task.pairs, rules, dtype=options.dtype, remat=options.remat)
        state, rows = create_state(specs, optimizer, rules, seed), functools.partial(self.task.rows, seed)
        test = [rows("test", range(at, at + self.batch)) for at in range(0, self.test_rows, self.batch)]
        found, started = 0.0, time.perf_counter()
        for number in range(1, self.steps + 1):
            first = (number - 1) * self.batch % (TRAIN_ROWS - self.batch)
            state, metrics = step(state, rows("train", range(first, first + self.batch)))
            if number % 100 == 0 or number == self.steps:
                found = float(np.mean([score(state.model, part) for part in test]))
                seconds = time.perf_counter() - started
                say(f"  step {number:5d}  loss {float(metrics['train/loss']):6.3f}  accuracy {found:.3f}  {seconds:5.0f} s")
                if found >= ENOUGH:
                    break
        return found


def compare(training: Training, name: str, rates: list[float], seeds: list[int], say: Callable[[str], None]) -> str:
    """A row of the table."""
    found = {}
    for rate in rates:
        say(f"{name}: learning rate {rate:g}, seed {seeds[0]}")
        found[rate] = [training.run(rate, seeds[0], say)]
    best = max(found, key=lambda rate: found[rate][0])
    for seed in seeds[1:]:
        say(f"{name}: learning rate {best:g}, seed {seed}")
        found[best].append(training.run(best, seed, say))
    mixer = training.config.stack.tail[0].mixers[0]
    state = mixer.state_size(training.config.d_model, training.task.length)
    sweep = ", ".join(f"{rate:g}: {scores[0]:.3f}" for rate, scores in found.items())
    scores = found[best]
    return f"| {name} | {state:,} | {np.mean(scores):.3f} | {min(scores):.3f} to {max(scores):.3f} | {best:g} | {sweep} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = lambda kind: lambda text: [kind(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--mixers", type=words(str), default=["attention", "gated_delta", "mamba2", "gla"])
    parser.add_argument("--seeds", type=words(int), default=[0, 1, 2])
    parser.add_argument("--rates", type=words(float), default=[1e-2, 3e-2])
    for option, default in {"steps": 600, "batch": 64, "width": 64, "head": 32, "length": 64, "pairs": 8, "vocab": 256}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--test-rows", type=int, default=1024)
    options = parser.parse_args()
    task = RecallTask(length=options.length, pairs=options.pairs, vocab_size=options.vocab)
    known, say = contestants(options.width, options.head), functools.partial(print, flush=True)
    if unknown := [name for name in options.mixers if name not in known]:
        parser.error(f"--mixers {','.join(unknown)}: there are {', '.join(known)}")
    rows = []
    for name in options.mixers:
        stack = Stack(head=(Block(mixers=(ShortConv(),)),), tail=(Block(mixers=(known[name],)),))
        config = LMConfig(d_model=options.width, vocab_size=options.vocab, stack=stack)
        training = Training(task, config, options.steps, options.batch, options.test_rows)
        rows.append(compare(training, name, options.rates, options.seeds, say))
    say(f"\n{options.length} tokens, {options.pairs} pairs, {options.vocab} ids; width {options.width}, heads of {options.head}")
    say("| mixer | state, values | accuracy | over seeds | learning rate | first seed, by learning rate |")
    say("| --- | --- | --- | --- | --- | --- |")
    say("\n".join(rows))


if __name__ == "__main__":
    main()
