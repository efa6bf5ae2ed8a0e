"""KL divergence of a model's next-token distribution from a sparse one, without the model's logits."""

from typing import Any

import jax
import jax.numpy as jnp

from mlt.parallel.divergence import cut
from mlt.parallel.local import STREAM, TOKENS, local
from mlt.parallel.rules import Rules


def sparse_divergence(
    rules: Rules,
    ids_BTW: jax.Array,
    probabilities_BTW: jax.Array,
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array,
    softcap: float | None = None,
) -> jax.Array:
    """sum over w of p_w (log p_w - log q[id_w]) in nats, (B, T) float32; q is the softmax of the model's logits.

    It needs the logits of W tokens and the log of the sum of all exponentials: logits of 512 positions exist at a time, and are
    made again for the gradients. Vocabulary shards meet in two numbers per token. No gradient flows to p.

    Args:
        rules: layout.
        ids_BTW: int32; an id outside [0, V) must have probability 0.
        probabilities_BTW: float32, adding up to 1 or, for a token without a distribution, all 0: its divergence is 0.
        hidden_BTD, unembedding_DV, softcap: what the model's logits are made of.
    """

    def run(hidden, unembedding, ids, p):
        shards = rules.size("vocab")
        own = ids - jax.lax.axis_index("tensor") * unembedding.shape[1] if shards > 1 else ids

        def chunk(_: None, xs: tuple[jax.Array, ...]) -> Any:
            hidden_BCD, ids_BCW, p_BCW = xs
            logits_BCV = jnp.einsum("bcd,dv->bcv", hidden_BCD, unembedding, preferred_element_type=jnp.float32)
            logits_BCV = logits_BCV if softcap is None else softcap * jnp.tanh(logits_BCV / softcap)
            lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
            inside_BCW = (ids_BCW >= 0) & (ids_BCW < logits_BCV.shape[-1])
            found_BCW = jnp.take_along_axis(logits_BCV, jnp.where(inside_BCW, ids_BCW, 0), axis=-1)
            expected_BC = jnp.sum(jnp.where(inside_BCW, p_BCW * found_BCW, 0.0), axis=-1)
            if shards > 1:
                lse_BC = jax.nn.logsumexp(jax.lax.all_gather(lse_BC, "tensor"), axis=0)
                expected_BC = jax.lax.psum(expected_BC, "tensor")
            entropy_BC = -jnp.sum(jax.scipy.special.xlogy(p_BCW, p_BCW), axis=-1)
            return None, jnp.sum(p_BCW, axis=-1) * lse_BC - expected_BC - entropy_BC

        _, parts = jax.lax.scan(jax.checkpoint(chunk, prevent_cse=False), None, (cut(hidden), cut(own), cut(p)))
        return parts.swapaxes(0, 1).reshape(hidden.shape[0], -1)[:, : hidden.shape[1]]

    sparse = ("batch", "seq", None)
    p_BTW = jax.lax.stop_gradient(probabilities_BTW.astype(jnp.float32))
    return local(run, rules, (STREAM, (None, "vocab"), sparse, sparse), TOKENS)(hidden_BTD, unembedding_DV, ids_BTW, p_BTW)
