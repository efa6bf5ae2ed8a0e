"""How a packed row is cut into pieces of at most C tokens, one step of the scan each.

The chunks of a document are counted from its own start, so they fall anywhere in a row. A piece holds

    either  one chunk of one document (the rest of a chunk, where a state is carried in),
    or      whole documents of at most C tokens, side by side: all of them are read and written at the initial memory,

so all tokens of a piece share the weights their gradients are taken at. Pieces are runs of the row in its order; what is
left of a row after its last piece is empty pieces, and a step that is empty for every row is skipped.

Letters: B rows, T tokens, J pieces, C slots of a piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mlt_kernels.test_time_memory._spec import MemorySpec


class Pieces(NamedTuple):
    """Where the tokens of a batch go."""

    token_JBC: Array  # the token in each slot
    real_JBC: Array  # the slot holds a token that is not padding
    home_BT: Array  # j C + c of each token
    document_JBC: Array  # equal for slots of one document
    place_JBC: Array  # of the slot's token in its chunk
    fresh_JB: Array  # the piece begins at the initial memory
    position_B: Array  # tokens of the last document seen by the end of the row

    def take(self, x_BT: Array) -> Array:
        """(B, T, ...) to (J, B, C, ...), zeros in the slots that hold no token or padding."""
        return _take(x_BT, self.token_JBC, self.real_JBC, self.home_BT)

    def put_back(self, x_JBC: Array) -> Array:
        """(J, B, C, ...) to (B, T, ...)."""
        return _put_back(x_JBC, self.token_JBC, self.real_JBC, self.home_BT)


class Grid(NamedTuple):
    """The same without documents and states: piece j is tokens j C to (j + 1) C of every row."""

    length: int
    real_JBC: Array
    place_JBC: Array
    fresh_JB: Array

    def take(self, x_BT: Array) -> Array:
        J, B, C = self.real_JBC.shape
        x = jnp.pad(x_BT, [(0, 0), (0, J * C - self.length)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(x.reshape(B, J, C, *x.shape[2:]), 1, 0)

    def put_back(self, x_JBC: Array) -> Array:
        x = jnp.moveaxis(x_JBC, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.length]


# A token has one slot, so the transpose of moving there is moving back: no sum, and no scatter.


@jax.custom_vjp
def _take(x_BT: Array, token_JBC: Array, real_JBC: Array, home_BT: Array) -> Array:
    x_JBC = x_BT[jnp.arange(x_BT.shape[0])[:, None], token_JBC]
    return jnp.where(real_JBC.reshape(*real_JBC.shape, *[1] * (x_JBC.ndim - 3)), x_JBC, 0)


@jax.custom_vjp
def _put_back(x_JBC: Array, token_JBC: Array, real_JBC: Array, home_BT: Array) -> Array:
    B, C = x_JBC.shape[1:3]
    return x_JBC[home_BT // C, jnp.arange(B)[:, None], home_BT % C]


_take.defvjp(
    lambda x, *where: (_take(x, *where), where),
    lambda where, grad: (_put_back(jnp.where(_like(where[1], grad), grad, 0), *where), None, None, None),
)
_put_back.defvjp(
    lambda x, *where: (_put_back(x, *where), where),
    lambda where, grad: (_take(grad, *where), None, None, None),
)


def _like(mask: Array, x: Array) -> Array:
    return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))


def grid(batch: int, length: int, spec: MemorySpec) -> Grid:
    """Pieces of rows of one document each."""
    size = min(spec.chunk_size, length)
    J = -(-length // size)
    token_JC = np.arange(J * size).reshape(J, size)
    period = spec.reset_every or J * size
    real_JBC = np.broadcast_to((token_JC < length)[:, None], (J, batch, size))
    place_JBC = np.broadcast_to(np.arange(size), (J, batch, size))
    fresh_JB = np.broadcast_to(token_JC[:, :1] % period == 0, (J, batch))
    return Grid(length, *(jnp.asarray(x) for x in (real_JBC, place_JBC, fresh_JB)))


def bound(length: int, chunk: int, packed: bool) -> int:
    """Pieces that a row of `length` tokens can need.

    Packed, the worst is one short document, then one of C + 1 tokens, again and again: three pieces for C + 2 tokens.
    """
    if not packed:
        return -(-(length + chunk - 1) // chunk)
    return min(length, 3 * length // (chunk + 2) + 3)


def pieces(segment_ids_BT: Array | None, position_B: Array | None, batch: int, length: int, spec: MemorySpec) -> Pieces:
    """Cuts rows into pieces.

    Args:
      segment_ids_BT: None for one document a row.
      position_B: tokens of token 0's document that were seen before this call, None for none: that document's first
        piece ends where its chunk does.
    """
    B, T, C = batch, length, spec.chunk_size
    ids_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else jnp.asarray(segment_ids_BT)
    at, row_B1 = jnp.arange(T), jnp.arange(B)[:, None]
    first_BT = jnp.concatenate([jnp.ones((B, 1), bool), ids_BT[:, 1:] != ids_BT[:, :-1]], axis=1)
    begin_BT, end_BT = _runs(first_BT)
    seen_B = jnp.zeros((B,), jnp.int32) if position_B is None else position_B
    position_BT = at - begin_BT + jnp.where(begin_BT == 0, seen_B[:, None], 0)
    if spec.reset_every:
        first_BT = first_BT | (position_BT % spec.reset_every == 0)
        begin_BT, end_BT = _runs(first_BT)
    fresh_BT = first_BT
    if position_B is not None:
        # A run that is entered with a state begins anew only where a reset falls on token 0.
        anew_B = (seen_B % spec.reset_every == 0) & (seen_B > 0) if spec.reset_every else jnp.zeros((B,), bool)
        fresh_BT = fresh_BT.at[:, 0].set(anew_B)

    # Where the next piece begins, if one begins here.
    place_BT = position_BT % C
    whole_documents = jnp.concatenate([begin_BT, jnp.full((B, C), T)], axis=1)[:, C : C + T]
    one_chunk = jnp.minimum(at + C - place_BT, end_BT)
    next_BT = jnp.where(fresh_BT & (end_BT - at <= C), whole_documents, one_chunk)
    next_BT = jnp.concatenate([next_BT, jnp.full((B, 1), T)], axis=1)

    def follow(here_B: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        there_B = next_BT[jnp.arange(B), here_B]
        return there_B, (here_B, there_B)

    J, width = bound(T, C, segment_ids_BT is not None), min(C, T)
    _, (start_JB, stop_JB) = jax.lax.scan(follow, jnp.zeros((B,), next_BT.dtype), length=J)
    token_JBC = start_JB[:, :, None] + jnp.arange(width)
    held_JBC = token_JBC < stop_JB[:, :, None]
    slot_JBC = jnp.arange(J * width).reshape(J, 1, width)
    home_BT = jnp.zeros((B, T), jnp.int32)
    home_BT = home_BT.at[row_B1, jnp.where(held_JBC, token_JBC, T)].set(slot_JBC.astype(jnp.int32), mode="drop")
    token_JBC = jnp.minimum(token_JBC, T - 1)

    last_token_B = jnp.max(jnp.where(ids_BT != 0, at, -1), axis=1)
    ended_B = position_BT[jnp.arange(B), jnp.maximum(last_token_B, 0)] + 1
    return Pieces(
        token_JBC=token_JBC,
        real_JBC=held_JBC & (ids_BT[row_B1, token_JBC] != 0),
        home_BT=home_BT,
        document_JBC=begin_BT[row_B1, token_JBC],
        place_JBC=place_BT[row_B1, token_JBC],
        fresh_JB=fresh_BT[jnp.arange(B), token_JBC[:, :, 0]],
        position_B=jnp.where(last_token_B < 0, seen_B, ended_B).astype(jnp.int32),
    )


def _runs(first_BT: Array) -> tuple[Array, Array]:
    """(first token, token after the last) of each token's run, from where runs begin."""
    B, T = first_BT.shape
    run_BT, row_B1 = jnp.cumsum(first_BT, axis=1) - 1, jnp.arange(B)[:, None]
    begins = jnp.full((B, T + 1), T).at[row_B1, run_BT].min(jnp.arange(T))
    return begins[row_B1, run_BT], begins[row_B1, run_BT + 1]
