"""A run with a memory beside it: held-out loss of the mixture of their next-token distributions.

p = (1 - share) p_LM + share p_memory, the inference of kNN-LM (arXiv 1911.00172), Memory Decoder (2508.09874) and MLP Memory
(2508.01832). The memory is the newest checkpoint of any run with the tokenizer and vocabulary of the first.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mlt.config.run import RunConfig
from mlt.data.loader import load_corpus, validation_batches
from mlt.errors import UserError
from mlt.loss import token_losses
from mlt.model.lm import LM
from mlt.model.mixture import log_mixture
from mlt.parallel.rules import Rules
from mlt.train.load import load_model

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def check_shares(memory: Path | None, shares: Sequence[float]) -> None:
    """Raises UserError: shares without a memory, none with one, or one that is no probability."""
    if memory is None and shares:
        raise UserError("--share: is the share of a memory; name its run with --memory")
    if memory is not None and not shares:
        raise UserError("--memory: needs --share, its share of the probabilities in [0, 1]")
    for share in shares:
        if not 0 <= share <= 1:
            raise UserError(f"--share {share}: must lie in [0, 1]")


def load_memory(config: RunConfig, memory: Path, *, dtype: str | None = None) -> tuple[RunConfig, LM, int]:
    """The model of a run, to be put beside that of another.

    Raises:
        UserError: it has another tokenizer or vocabulary, or it reads clusters of documents, which only one can have.
    """
    found = load_model(memory, dtype=dtype)
    other = found[0]
    if other.data.tokenizer.digest != config.data.tokenizer.digest:
        raise UserError(f"--memory {memory}: has another tokenizer; both must mean the same tokens by the same ids")
    if other.model.vocab_size != config.model.vocab_size:
        rule = f"has a vocabulary of {other.model.vocab_size}, and the run {config.model.vocab_size}"
        raise UserError(f"--memory {memory}: {rule}; train it with model.vocab_size={config.model.vocab_size}")
    if other.data.clusters is not None:
        raise UserError(f"--memory {memory}: reads clusters of documents, and a memory is given none; use it as the run")
    return found


def held_out(
    run_dir: Path,
    *,
    say: Callable[[str], None],
    rows: int,
    step: int | None = None,
    memory: Path | None = None,
    shares: Sequence[float] = (),
) -> list[tuple[float, float]]:
    """Print the mean loss on held-out documents for each share, from one pass of both models over them.

    Args:
        rows: of the held-out split, those of the memory's data where there is a memory: it is made for them.
        shares: SHARES by default.

    Returns:
        (share, nats per token) of each line; the share is 0 without a memory.

    Raises:
        UserError: the runs do not fit each other, or there is nothing held out.
    """
    shares = shares or (SHARES if memory is not None else ())
    check_shares(memory, shares)
    config, model, at = load_model(run_dir, step)
    voices, data = [(config, model)], config.data
    if memory is not None:
        if config.data.clusters is not None:
            raise UserError(f"{run_dir}: reads clusters of its own documents, and these are those of {memory}")
        other, beside, _ = load_memory(config, memory)
        voices.append((other, beside))
        data = other.data
    batches = validation_batches(data, load_corpus(data), max_rows=rows)
    if not len(batches):
        raise UserError("data.validation_fraction is 0: no documents are held out")
    nats = np.zeros(max(len(shares), 1))
    tokens, runs = 0.0, [_losses(own) for own, _ in voices]

    @jax.jit
    def mixed(model_BT: jax.Array, memory_BT: jax.Array) -> jax.Array:
        return jnp.stack([jnp.sum(-log_mixture(-model_BT, -memory_BT, share)) for share in shares])

    for batch in batches:
        found = [run(model, batch) for run, (_, model) in zip(runs, voices, strict=True)]
        nats += np.asarray(mixed(*found) if memory is not None else jnp.sum(found[0])[None], np.float64)
        tokens += float(batch["weights"].sum())
    say(f"held-out loss of step {at}, {int(tokens):,} tokens" + ("" if memory is None else f", with {memory} beside it"))
    lines = list(zip(shares or (0.0,), (nats / tokens).tolist(), strict=True))
    for share, loss in lines:
        said = f"{loss:.4f} nats a token, perplexity {np.exp(loss):.3f}"
        say(said if memory is None else f"  share {share:<5g} {said}")
    return lines


def _losses(config: RunConfig) -> Callable[[LM, dict[str, np.ndarray]], jax.Array]:
    """Weighted loss of each token; 0 at padding, where any mixture then has 0 as well."""
    dtype = jnp.dtype(config.train.compute_dtype)
    return jax.jit(lambda model, batch: token_losses(model, batch, Rules(None), dtype=dtype, remat=config.remat)[0])
