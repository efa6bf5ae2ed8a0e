"""Next-token cross-entropy straight from hidden states, without the (B, T, V) logits."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from mlt_kernels import dispatch
from mlt_kernels.shapes import Shapes

OP = "cross_entropy"


def cross_entropy(
    hidden: Array,
    unembedding: Array,
    labels: Array,
    *,
    weights: Array | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_size: int = 512,
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    """For every token, in nats:

        logits = hidden @ unembedding             with softcap: softcap * tanh(logits / softcap)
        lse    = log sum exp(logits)
        loss   = weight * (lse - logits[label] + z_loss * lse ** 2)

    The caller sums the losses and divides by the sum of the weights over all devices and accumulation steps.

    A label outside [0, V) stands for no token: its logit counts as 0 and gives no gradient. So any label is
    harmless where the weight is 0, and a vocabulary split over devices needs no other op: each device passes its
    columns and `labels - first_column`, with z_loss 0 and `return_lse`; the devices' lse meet in a logsumexp, and
    their label logits, lse - loss, in a sum.

    Args:
      hidden: (B, T, D).
      unembedding: (D, V).
      labels: (B, T) integer.
      weights: (B, T), None for 1.
      z_loss: coefficient of lse ** 2.
      softcap: positive number, or None.
      chunk_size: positions whose logits exist at a time, B * chunk_size * V numbers of 4 bytes. Only T is cut, so an
        array sharded along the batch stays so. The result does not depend on it beyond rounding.
      return_lse: also return lse, with its true gradient.
      implementation: see `mlt_kernels.dispatch`.

    Returns:
      loss (B, T) float32, or (loss, lse (B, T) float32). Products accumulate in float32, the gradient of the
      unembedding over all chunks too (float64 for float64 inputs).

    Raises:
      ValueError, TypeError: a shape, dtype or option is wrong.
      UnsupportedError: the implementations asked for cannot run this call.

    Sources: arXiv 2411.09009 (no logits in memory), 2506.03077 (chunks with exact gradients), 2204.02311 (z-loss).
    """
    shapes = Shapes(OP)
    shapes.check("hidden", hidden, "B T D")
    shapes.check("unembedding", unembedding, "D V")
    shapes.check("labels", labels, "B T", kind="integer")
    if weights is not None:
        shapes.check("weights", weights, "B T")
    shapes.positive("chunk_size", chunk_size)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{OP}: softcap={softcap!r}; expected a positive number or None")
    dtype = jnp.result_type(hidden, unembedding)
    wide = jnp.result_type(jnp.float32, dtype)
    arguments = {
        "hidden": hidden.astype(dtype),
        "unembedding": unembedding.astype(dtype),
        "labels": labels,
        "weights": jnp.ones(labels.shape, wide) if weights is None else weights.astype(wide),
        "z_loss": float(z_loss),
        "softcap": None if softcap is None else float(softcap),
        "chunk_size": chunk_size,
        "return_lse": return_lse,
    }
    return dispatch.call(OP, implementation, arguments)
