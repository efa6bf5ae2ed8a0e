"""The training loss: chunked cross-entropy plus what the mixers add."""

from typing import Any

import jax
import jax.numpy as jnp

from mlt.mixers.base import Context
from mlt.model.lm import LM
from mlt.model.remat import Remat
from mlt.parallel import ops
from mlt.parallel.rules import Rules
from mlt.parallel.sparse_divergence import sparse_divergence
from mlt.parallel.table import rows_in

Batch = dict[str, jax.Array]


def context_of(batch: Batch, rules: Rules, *, train: bool) -> Context:
    """What the mixers may know of a batch (fields of `data/pack.py`, each (B, T), and rows of `train/hashing.py`)."""
    return Context(batch["tokens"], batch["segment_ids"], batch["positions"], rules, train, rows=rows_in(batch))


def token_losses(
    model: LM,
    batch: Batch,
    rules: Rules,
    *,
    dtype: jnp.dtype,
    remat: Remat,
    z_loss: float = 0.0,
    neighbour_weight: float = 0.0,
    train: bool = False,
) -> tuple[jax.Array, Any]:
    """(weighted loss per token (B, T) float32 in nats, mixers' aux). Logits never exist whole."""
    hidden_BTD, aux = model(context_of(batch, rules, train=train), dtype=dtype, remat=remat)
    losses_BT = hidden_losses(model, hidden_BTD, batch, rules, z_loss=z_loss)
    return beside_neighbours(neighbour_weight, losses_BT, aux, model, hidden_BTD, batch, rules)


def beside_neighbours(
    weight: float, losses_BT: jax.Array, aux: Any, model: LM, hidden_BTD: jax.Array, batch: Batch, rules: Rules
) -> tuple[jax.Array, Any]:
    """(1 - weight) of the losses and weight KL(p_kNN | p), with both means in the aux; p_kNN comes with the batch
    (`data/neighbours.py`). Batches without it, as those of evaluations, keep their losses.
    """
    if weight == 0 or "neighbours/ids" not in batch:
        return losses_BT, aux
    sparse = (batch["neighbours/ids"], batch["neighbours/probabilities"])
    head = (model.unembedding().astype(hidden_BTD.dtype), model.config.logit_softcap)
    apart_BT = batch["weights"] * sparse_divergence(rules, *sparse, hidden_BTD, *head)
    total = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    facts = {"metric/neighbour_kl": jnp.sum(apart_BT) / total, "metric/cross_entropy": jnp.sum(losses_BT) / total}
    return (1 - weight) * losses_BT + weight * apart_BT, {**aux, "neighbours": facts}


def hidden_losses(model: LM, hidden_BTD: jax.Array, batch: Batch, rules: Rules, *, z_loss: float = 0.0) -> jax.Array:
    """Weighted loss per token (B, T) float32 in nats, of the model's final hidden states."""
    return ops.cross_entropy(
        rules,
        hidden_BTD,
        model.unembedding(),
        batch["targets"],
        weights=batch["weights"],
        z_loss=z_loss,
        softcap=model.config.logit_softcap,
    )


def reduce_aux(aux: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(sum of the `loss/` entries over all layers, mean over layers of each `loss/` and `metric/` entry)."""
    gathered: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(aux)[0]:
        name = path[-1].key
        if not name.startswith("count/"):
            gathered.setdefault(name, []).append(jnp.ravel(leaf))
    flat = {name: jnp.concatenate(values) for name, values in gathered.items()}
    total = sum((jnp.sum(value) for name, value in flat.items() if name.startswith("loss/")), jnp.zeros(()))
    return total, {name: jnp.mean(value) for name, value in flat.items()}
