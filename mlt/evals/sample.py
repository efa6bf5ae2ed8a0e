"""`mlt generate`: text from a run's checkpoint."""

from pathlib import Path

import jax

from mlt.errors import UserError
from mlt.evals.mixture import check_shares, load_memory
from mlt.model.float8_tables import held_in_8_bits
from mlt.parallel.rules import Rules
from mlt.train.clusters import check_cluster, kept_tree
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
    memory: Path | None = None,
    share: float | None = None,
    cluster: int | None = None,
) -> str:
    """The prompt and what the model says next; `dtype` is the type that its parameters are held in.

    With `memory`, the run of a memory, tokens are drawn from (1 - share) of the model's probabilities and share of its.
    `cluster` is the leaf of the prompt's document; None finds it by its words in the run's tree, if there is one.

    Raises:
        UserError: the directory holds no run or no checkpoint, or an option is out of range.
    """
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: must be at least 1")
    if temperature < 0:
        raise UserError(f"--temperature {temperature}: must not be negative; 0 takes the most likely token")
    check_shares(memory, () if share is None else (share,))
    config, model, _ = load_model(run_dir, step, dtype=dtype)
    model = held_in_8_bits(model)
    beside = {}
    if memory is not None:
        beside = {"memory": load_memory(config, memory, dtype=dtype)[1], "share": share}
    key = jax.random.key(seed)
    check_cluster(config, cluster)
    placed = {"tree": kept_tree(run_dir, config) if cluster is None else None, "cluster": cluster}
    options = {"tokens": tokens, "temperature": temperature, "key": key, **placed, **beside}
    return prompt + draw_text(config, model, Rules(None), prompt, **options)
