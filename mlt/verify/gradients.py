"""Every gradient is finite, and none is silently absent."""

import jax
import jax.numpy as jnp
import numpy as np

from mlt.loss import token_losses
from mlt.nn.param import merge, named_leaves, partition
from mlt.verify.model import DTYPE, Subject
from mlt.verify.result import Result


def gradients(subject: Subject, seed: int) -> Result:
    """Differentiate the loss of packed rows; name parameters whose gradient is not finite, or zero throughout."""
    batch = subject.rows(seed)
    trained, buffers = partition(subject.model)

    @jax.jit
    def run(trained):
        def loss(trained):
            losses, _ = token_losses(merge(trained, buffers), batch, subject.rules, dtype=DTYPE, remat=subject.remat, train=True)
            return jnp.sum(losses)

        return jax.grad(loss)(trained)

    grads = {name: np.asarray(grad) for name, grad in named_leaves(run(trained))}
    broken = [name for name, grad in grads.items() if not np.isfinite(grad).all()]
    dead = [name for name, grad in grads.items() if not grad.any()]
    if broken:
        return Result("gradients", False, "not finite: " + ", ".join(broken))
    if dead:
        return Result("gradients", False, "zero throughout: " + ", ".join(dead))
    return Result("gradients", True, f"finite and present for all {len(grads)} parameters")
