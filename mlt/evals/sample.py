"""`mlt generate`: text from a run's checkpoint."""

from pathlib import Path

import jax

from mlt.errors import UserError
from mlt.parallel.rules import Rules
from mlt.train.load import load_model
from mlt.train.sample import draw_text


def sample_run(run_dir: Path, prompt: str, *, tokens: int, temperature: float, seed: int, step: int | None = None) -> str:
    """The prompt and what the model says next.

    Raises:
        UserError: the directory holds no run or no checkpoint, or an option is out of range.
    """
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: must be at least 1")
    if temperature < 0:
        raise UserError(f"--temperature {temperature}: must not be negative; 0 takes the most likely token")
    config, model, _ = load_model(run_dir, step)
    key = jax.random.key(seed)
    return prompt + draw_text(config, model, Rules(None), prompt, tokens=tokens, temperature=temperature, key=key)
