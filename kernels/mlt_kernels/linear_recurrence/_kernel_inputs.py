"""A call as kernels are given it: whole chunks, gates, documents, sums of decays; and what decays feel. Shared by the Pallas and
the Triton backends.

Letters: B rows, T tokens, J chunks, C tokens of a chunk, H value heads, K key dim, V value dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mlt_kernels import segments

HIGHEST = jax.lax.Precision.HIGHEST
LOWEST = -128.0
"""Log decays are clamped here; from -104 on, exp is 0 in float32."""
GRID = 2.0**8
SMALLEST, LARGEST = 16, 256
"""Key and value dims that a Triton kernel takes: its products need 16, its registers end at 256."""

ANCHOR = 16
"""Chunks between two states that the forward sweep of a backward pass leaves to the backward sweep, for the decays' gradients."""
INTERPRETED_ANCHOR = 2
"""The same where kernels are interpreted: small tests have several."""
OF_VALUES = ("forward", "values")
"""Kernels of the add rule whose programs own a slab of V and all of K; `queries` and `keys` own a slab of K and all of V."""


class Arrays(NamedTuple):
    """Differentiable inputs. g: log decays (B, T, H) or (B, T, H, K), at least -128. u: write strengths (B, T, H), 0 at
    padding."""

    q: Array
    k: Array
    v: Array
    g: Array | None
    u: Array | None
    state: Array | None


class Documents(NamedTuple):
    """Where the documents lie in the chunks. A chunk is entered with a document if its first token continues it."""

    first_BT: Array  # place in its chunk of the first token of a token's document, -1 if entered with it; padding: C
    first_end_BJ: Array  # the same of the document that each chunk is left with; padding belongs to what precedes it


def chunk_length(wanted: int, least: int, T: int, chunk_size: int | None) -> int:
    """Tokens of a chunk: no longer than the row needs or, where states by `chunk_size` are returned, than these."""
    if chunk_size is not None:
        wanted = min(wanted, chunk_size)
    return max(least, min(wanted, 1 << (T - 1).bit_length()))


def whole_chunks(
    *,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    beta: Array | None,
    log_input: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
    length: int,
) -> tuple[Arrays, Array | None]:
    """A call's arrays, operands in their common dtype, and its segment ids, with T a multiple of `length`. Padding, the given one
    and that added here, decays nothing and writes nothing."""
    B, T, H, _ = v.shape
    low = jnp.result_type(q, k, v)
    u = beta if log_input is None else jnp.exp(log_input) if beta is None else beta * jnp.exp(log_input)
    g = None if log_decay is None else jnp.maximum(log_decay, LOWEST)
    if g is not None and g.ndim == 1:
        g = jnp.broadcast_to(g, (B, T, H))
    if segment_ids is not None:
        real = (segment_ids != 0)[..., None]
        u = jnp.where(real, jnp.float32(1.0) if u is None else u, 0.0) * jnp.ones((1, 1, H), jnp.float32)
        g = None if g is None else jnp.where(real[..., None] if g.ndim == 4 else real, g, 0.0)

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, -T % length)] + [(0, 0)] * (x.ndim - 2))

    arrays = Arrays(
        *(padded(x.astype(low)) for x in (q, k, v)),
        g=None if g is None else padded(g),
        u=None if u is None else padded(u),
        state=None if initial_state is None else initial_state.astype(jnp.float32),
    )
    return arrays, None if segment_ids is None else padded(segment_ids)


def returned(found: Any, v: Array, return_final_state: bool, return_chunk_states: bool) -> Any:
    """What the public function returns of (o, final state, states): o without the added tokens, in the dtype of v."""
    o, final, states = found
    result = [o[:, : v.shape[1]].astype(v.dtype)]
    if return_final_state:
        result.append(final)
    if return_chunk_states:
        result.append(states)
    return result[0] if len(result) == 1 else tuple(result)


def documents(segment_ids_BT: Array | None, length: int) -> tuple[Documents | None, Array | None]:
    """Documents, and the same places with padding told as what precedes it, for T a multiple of the chunk length."""
    if segment_ids_BT is None:
        return None, None
    B, T = segment_ids_BT.shape
    start_BJC = segments.starts(segment_ids_BT).reshape(B, T // length, length)
    place_BJC = jax.lax.cummax(jnp.where(start_BJC, jnp.arange(length, dtype=jnp.int32), -1), axis=2)
    first_BT = jnp.where(segment_ids_BT != 0, place_BJC.reshape(B, T), length)
    return Documents(first_BT, place_BJC[:, :, -1]), place_BJC


def decay_sums(g_BTH: Array, place_BJC: Array | None, length: int) -> tuple[Array, Array]:
    """(B, H, T) twice: log decays summed since the chunk or the document began, as a coarse part and a rest.

    The coarse parts are multiples of 1/256, whose sums and differences are exact: in one float32 sum a few strong
    decays would leave no digits for the mild ones that follow.
    """
    B, T, H = g_BTH.shape
    place = jnp.arange(length)
    lower_CC = place[:, None] >= place
    coarse_BTH = jnp.round(g_BTH * GRID) / GRID
    parts = jnp.stack([coarse_BTH, g_BTH - coarse_BTH]).reshape(2, B, T // length, length, H)
    if place_BJC is None:
        sums = jnp.einsum("ij,pbcjh->pbhci", lower_CC.astype(g_BTH.dtype), parts, precision=HIGHEST)
    else:
        within = (lower_CC & (place_BJC[..., None] <= place)).astype(g_BTH.dtype)
        sums = jnp.einsum("bcij,pbcjh->pbhci", within, parts, precision=HIGHEST)
    sums = sums.reshape(2, B, H, T)
    return sums[0], sums[1]


def by_key_head(x_BTHK: Array, like: Array) -> Array:
    """Sums a gradient of every value head over those that read one query/key head."""
    B, T, Hk, K = like.shape
    return jnp.sum(x_BTHK.reshape(B, T, Hk, -1, K), axis=3).astype(like.dtype) if x_BTHK.shape[2] != Hk else x_BTHK


def decay_gradient(
    of_queries: dict[str, Array], of_keys: dict[str, Array], documents: Documents | None, C: int, stride: int
) -> Array:
    """(B, T, H): what each log decay feels, from reads and writes of states it lies between.

    What decays feel of a state that passes their whole chunk is known in the last chunk of each group. Before it, it follows
    chunk by chunk: what passes a chunk is what passes the next one or is read there, less what the chunk itself wrote.
    """
    parts = [jnp.sum(x, axis=0) for x in (of_queries["pairs"], of_queries["reads"], of_keys["writes"])]
    B, H, T = parts[0].shape
    pairs, reads, writes = (x.reshape(B, H, T // C, C) for x in parts)
    whole = None if documents is None else (documents.first_end_BJ < 0)[:, None, :]
    last = jnp.sum(of_keys["through"], axis=0)
    passing = through(jnp.sum(reads, axis=3), jnp.sum(writes, axis=3), last, whole, stride)
    t = jnp.arange(C)
    later = (t[:, None] >= t).astype(jnp.float32)  # (i, t): reads at or after t
    earlier = (t[:, None] < t).astype(jnp.float32)  # (j, t): writes before t
    felt = jnp.matmul(reads, later, precision=HIGHEST) + jnp.matmul(writes, earlier, precision=HIGHEST)
    return jnp.swapaxes((pairs + felt + passing[..., None]).reshape(B, H, T), 1, 2)


def through(reads: Array, writes: Array, last: Array, whole: Array | None, stride: int) -> Array:
    """(B, H, J): what states that pass a whole chunk feel there, given that of each group's last; 0 where a document starts."""
    B, H, J = reads.shape
    number = -(-J // stride)
    padding = [(0, 0), (0, 0), (0, number * stride - J)]
    reads, writes = (jnp.pad(x, padding).reshape(B, H, number, stride) for x in (reads, writes))
    if whole is not None:
        whole = jnp.pad(whole, padding).reshape(B, 1, number, stride)
    lengths = np.minimum(stride, J - stride * np.arange(number))
    passing = jnp.zeros_like(last)
    felt: list[Array] = []
    for n in reversed(range(stride)):
        passing = passing - writes[..., n]
        if whole is not None:
            passing = jnp.where(whole[..., n], passing, 0.0)
        passing = jnp.where(lengths == n + 1, last, passing)
        felt.append(passing)
        passing = passing + reads[..., n]
    return jnp.stack(felt[::-1], axis=3).reshape(B, H, -1)[:, :, :J]
