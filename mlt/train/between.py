"""What a run does between two steps beside saving: the evaluation of what is held out, and a sample of text."""

import json
from collections.abc import Callable

import jax

from mlt.report.sinks import MetricSinks
from mlt.train.background import Task
from mlt.train.distributed import first_says
from mlt.train.evaluate import Evaluator
from mlt.train.sample import draw_text, sampled_steps
from mlt.train.services import Services
from mlt.train.state import TrainState
from mlt.train.stopping import StoppedEarly


def evaluate(
    step: int,
    state: TrainState,
    services: Services,
    evaluator: Evaluator,
    compiling: Callable[[], Task],
    sinks: MetricSinks,
) -> bool:
    """Evaluate, log, and draw a sample where the config asks for it.

    Args:
        step: how many steps made the state.
        state: holds the model.
        services: of the run.
        evaluator: holds the rows.
        compiling: begins to compile the evaluation, or gives what was begun before.
        sinks: take the result.

    Returns:
        Whether it was done; not where the run is to stop before it, or stops in it.
    """
    stopping = services.stopping
    if stopping.name is not None:
        return False
    what = f"the evaluation after step {step}"

    def between_batches() -> None:
        services.watchdog.progress(what)
        stopping.give_up_if_asked()

    services.watchdog.progress(what)
    try:
        with services.goodput.during("compile"):
            stopping.wait(compiling())
        with services.goodput.during("evaluation"):
            result = evaluator(state.model, between_batches)
    except StoppedEarly:
        return False
    if result is None:
        return True
    sinks.log(step, result.metrics())
    generic = "" if result.generic is None else f", {result.generic.loss:.3f} with the generic block"
    services.console.say(
        f"step {step}: held-out loss {result.loss:.3f}{generic}, {result.bits_per_byte:.3f} bits per byte "
        f"({result.tokens:,} tokens, {evaluator.num_bytes:,} bytes)"
    )
    if services.config.sample.at_evaluations and step < services.config.train.steps:
        sample(step, state, services)
    return True


def sample(step: int, state: TrainState, services: Services) -> None:
    """Draw the sample after a step, unless an earlier start has it."""
    wanted, path = services.config.sample, services.directory.samples_path
    if wanted.tokens == 0 or first_says(step in sampled_steps(path)):
        return
    services.watchdog.progress(f"the sample after step {step}")
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
    clusters = services.config.data.clusters
    tree = None if clusters is None else services.setup.corpus.clustered(clusters).tree
    options = {"tokens": wanted.tokens, "temperature": wanted.temperature, "key": key, "tree": tree}
    with services.goodput.during("evaluation"):
        text = draw_text(services.config, state.model, services.setup.rules, wanted.prompt, **options)
    if services.peers.index == 0:
        with services.book.tolerating("the sample"), path.open("a") as file:
            file.write(json.dumps({"step": step, "prompt": wanted.prompt, "text": text}) + "\n")
    services.console.say(f"--- sample after {step} steps ---\n{wanted.prompt}{text}\n---")
