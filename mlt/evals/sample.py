"""`mlt generate`: text from a run's checkpoint."""

from pathlib import Path

import jax

from mlt.errors import UserError
from mlt.parallel.rules import Rules
from mlt.train.clusters import kept_tree
from mlt.train.load import load_model
from mlt.train.sample import draw_text


def sample_run(
    run_dir: Path,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    seed: int,
    step: int | None = None,
    dtype: str | None = None,
) -> str:
    """The prompt and what the model says next; `dtype` is the type that its parameters are held in.

    Raises:
        UserError: the directory holds no run or no checkpoint, or an option is out of range.
    """
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: must be at least 1")
    if temperature < 0:
        raise UserError(f"--temperature {temperature}: must not be negative; 0 takes the most likely token")
    config, model, _ = load_model(run_dir, step, dtype=dtype)
    key = jax.random.key(seed)
    options = {"tokens": tokens, "temperature": temperature, "key": key, "tree": kept_tree(run_dir, config)}
    return prompt + draw_text(config, model, Rules(None), prompt, **options)
