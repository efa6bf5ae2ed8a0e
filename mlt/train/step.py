"""The train step and the evaluation step: pure functions of (state, batch)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlt.loss import Batch, reduce_aux, token_losses
from mlt.model.lm import LM
from mlt.model.remat import Remat
from mlt.nn.param import merge, partition
from mlt.optim.table import apply_updates, gradient_norm, rows_only_if, scaled, without
from mlt.parallel.rules import Rules
from mlt.train import sparse
from mlt.train.distill import Taught, Teacher, distilled_losses, moved, within_step
from mlt.train.guard import GuardConfig, choose, judge
from mlt.train.router_load import load_metrics
from mlt.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step needs beside its arrays.

    Attributes:
        rules: layout.
        remat: memory policy.
        dtype: compute type; parameters stay float32.
        grad_accumulation: micro-batches per step.
        clip_norm: global gradient norm above which gradients are scaled down; None never clips.
        z_loss: weight of the squared log-partition.
        neighbour_weight: share of the divergence from the batch's neighbours in the loss.
        gradient_places: shardings of the gradients where they differ from the parameters' (`mesh.zero = 2`).
        guard: which updates are left out.
        teacher: what the model learns from beside the data; its arrays are given to the step as an argument.
    """

    rules: Rules
    remat: Remat
    dtype: jnp.dtype
    grad_accumulation: int = 1
    clip_norm: float | None = 1.0
    z_loss: float = 0.0
    neighbour_weight: float = 0.0
    gradient_places: Any = None
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    teacher: Teacher | None = None


def train_step(
    state: TrainState,
    batch: Batch,
    teacher: Teacher | None = None,
    *,
    optimizer: optax.GradientTransformation,
    options: StepOptions,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer update on a global batch; (new state, float32 scalars to log).

    The loss is the weighted sum over the batch's tokens divided by the batch's total weight, however the batch is
    split into micro-batches, so ragged micro-batches do not bias it. Losses of mixers are means over micro-batches, each of
    which may know the counts of those before it (`Mixer.within_step`). Where the guard refuses the loss or the gradient, the
    step counts but nothing moves: parameters, buffers and optimizer state, its own count included, keep their bits.
    """
    trained, buffers = partition(state.model)
    total_weight = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    losses_of = token_losses if teacher is None else functools.partial(distilled_losses, teacher)

    def objective(trained: LM, given: tuple[Batch, Any]) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        micro, before = given
        model = merge(trained, buffers)
        losses, aux = losses_of(
            model if before is None else within_step(model, before, teacher),
            micro,
            options.rules,
            dtype=options.dtype,
            remat=options.remat,
            z_loss=options.z_loss,
            neighbour_weight=options.neighbour_weight,
            train=True,
        )
        loss = jnp.sum(losses) / total_weight
        extra, _ = reduce_aux(aux)
        return loss + extra / options.grad_accumulation, (loss, aux)

    lazy = getattr(optimizer, "lazy", ())
    gradient = sparse.gradient(objective, lazy)
    micro_batches = options.grad_accumulation > 1
    run = functools.partial(_accumulate, gradient, options=options) if micro_batches else gradient
    loss, aux, grads, records = run(trained, batch if micro_batches else (batch, None))

    if options.gradient_places is not None:
        grads = jax.lax.with_sharding_constraint(grads, without(options.gradient_places, lazy))
    grads = sparse.with_rows(grads, records, trained, options.rules)
    norm = gradient_norm(grads)
    if options.clip_norm is not None:
        grads = scaled(grads, jnp.minimum(1.0, options.clip_norm / (norm + 1e-6)))
    accept, guard, told = judge(state.guard, loss, norm, options.guard)
    if options.guard.skips:
        grads = rows_only_if(accept, grads)
    updates, opt_state = optimizer.update(grads, state.optimizer, trained)
    model = moved(merge(apply_updates(trained, updates), buffers), aux, teacher)
    if options.guard.skips:
        model, opt_state = sparse.kept(accept, (model, opt_state), (state.model, state.optimizer), lazy, choose)
    metrics = {"train/loss": loss, "train/grad_norm": norm, **told}
    metrics |= {f"aux/{name.split('/', 1)[1]}": value for name, value in reduce_aux(aux)[1].items()}
    metrics |= load_metrics(state.model.config.stack, aux)
    return TrainState(state.step + 1, model, opt_state, state.key, guard), metrics


def jit_train_step(abstract: TrainState, optimizer: optax.GradientTransformation, options: StepOptions) -> Any:
    """The jitted step. It donates its state and returns the new one laid out as the old one was.

    Args:
        abstract: shapes and shardings of the state (`abstract_state`).
    """
    step = functools.partial(train_step, optimizer=optimizer, options=options)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    return jitted if options.teacher is None else Taught(jitted, options.teacher)


def _accumulate(gradient, trained, batch, options):
    """Sum losses, aux and gradients over micro-batches in one scan; records of table rows are stacked."""
    count = options.grad_accumulation

    def split(x: jax.Array) -> jax.Array:
        # Every micro-batch takes rows from every batch shard: no row moves between devices.
        parts = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return options.rules.constrain(parts, (None, "batch", "seq"))

    def body(total: Any, micro: Batch) -> tuple[Any, sparse.Records]:
        _, aux, _ = total
        *sums, records = gradient(trained, (micro, aux))
        return jax.tree.map(jnp.add, total, sums), records

    micro_batches = jax.tree.map(split, batch)
    one = jax.tree.map(lambda x: x[0], micro_batches)
    *shapes, _ = jax.eval_shape(lambda m: gradient(trained, (m, None)), one)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (loss, aux, grads), records = jax.lax.scan(body, start, micro_batches)
    return loss, _average_metrics(aux, count), grads, records


def _average_metrics(aux, count):
    """Counts stay sums over the step; losses and metrics become means."""

    def scale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf if path[-1].key.startswith("count/") else leaf / count

    return jax.tree_util.tree_map_with_path(scale, aux)


def eval_step(model: LM, batch: Batch, *, options: StepOptions) -> dict[str, jax.Array]:
    """Sums over a batch: `nats` of weighted loss and `weight` of tokens. Sums add up across batches; means do not."""
    losses, _ = token_losses(model, batch, options.rules, dtype=options.dtype, remat=options.remat)
    return {"nats": jnp.sum(losses), "weight": jnp.sum(batch["weights"])}
