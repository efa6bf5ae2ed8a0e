"""How the dims of an array lie over mesh axes, and how one primitive hands that on: what a partitioner would decide.

A split is one tuple of mesh axes for each dim, as in a `PartitionSpec`. Only primitives outside `shard_map` are asked about:
there XLA lays arrays out from constraints, and these rules follow it where it has no choice (a product of a split dim is
split; a sum over a split dim crosses devices) and take the cheaper side where it has one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

Split = tuple[tuple[str, ...], ...]
Sizes = Mapping[str, int]


def whole(rank: int) -> Split:
    """The split of an array that every device holds."""
    return ((),) * rank


def from_spec(spec: PartitionSpec, rank: int) -> Split:
    parts = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
    return tuple(parts) + ((),) * (rank - len(parts))


def effective(split: Split, sizes: Sizes) -> Split:
    """Without axes of one shard."""
    return tuple(tuple(axis for axis in dim if sizes[axis] > 1) for dim in split)


def shards(axes: Iterable[str], sizes: Sizes) -> int:
    return math.prod(sizes[axis] for axis in axes)


def local_shape(shape: Sequence[int], split: Split, sizes: Sizes) -> tuple[int, ...]:
    """What one device holds of an array; uneven parts are padded."""
    return tuple(-(-n // shards(dim, sizes)) for n, dim in zip(shape, split, strict=True))


def axes_of(split: Split) -> set[str]:
    return {axis for dim in split for axis in dim}


def without(split: Split, axes: set[str]) -> Split:
    return tuple(tuple(axis for axis in dim if axis not in axes) for dim in split)


def merged(splits: Sequence[Split]) -> Split:
    """Of an elementwise result: dim by dim the first operand that is split there, no axis twice."""
    taken: set[str] = set()
    result = []
    for dims in zip(*splits, strict=True):
        dim = next((d for d in dims if d and not taken & set(d)), ())
        taken |= set(dim)
        result.append(dim)
    return tuple(result)


def broadcast(split: Split, shape: Sequence[int], out_shape: Sequence[int], dims: Sequence[int]) -> Split:
    """Of `broadcast_in_dim`: dim i of the operand becomes dim `dims[i]`."""
    result = [()] * len(out_shape)
    for i, dim in enumerate(dims):
        result[dim] = split[i] if shape[i] == out_shape[dim] else ()
    return tuple(result)


def reshaped(split: Split, shape: Sequence[int], out_shape: Sequence[int], sizes: Sizes) -> Split:
    """Groups of dims with equal products change into each other; the axes of a group go to its first dim that they divide."""
    result: list[tuple[str, ...]] = []
    i = j = 0
    while i < len(shape) or j < len(out_shape):
        i0, j0 = i, j
        left, right = 1, 1
        while i < len(shape) and (i == i0 or left < right):
            left, i = left * shape[i], i + 1
            while j < len(out_shape) and right < left:
                right, j = right * out_shape[j], j + 1
        while j < len(out_shape) and (right < left or out_shape[j] == 1 or i >= len(shape)):
            right, j = right * out_shape[j], j + 1
        group = [axis for dim in split[i0:i] for axis in dim]
        for n in out_shape[j0:j]:
            fits = group if group and n % shards(group, sizes) == 0 else []
            result.append(tuple(fits))
            group = [] if fits else group
    return tuple(result)


def by_position(splits: Sequence[Split], shapes: Sequence[Sequence[int]], out_shape: Sequence[int]) -> Split:
    """Of any other primitive: the dims that the largest operand of the same rank has unchanged stay as they are."""
    alike = [(math.prod(shape), i) for i, shape in enumerate(shapes) if len(shape) == len(out_shape)]
    if not alike:
        return whole(len(out_shape))
    _, best = max(alike)
    return tuple(d if n == m else () for d, n, m in zip(splits[best], shapes[best], out_shape, strict=True))


def product(
    left: Split, right: Split, numbers: Any, nbytes: tuple[int, int]
) -> tuple[Split, set[str], tuple[set[str], set[str]]]:
    """Of `dot_general`: (split of the result, axes that its sum runs over, axes over which each operand is gathered first).

    An axis in both operands on dims that do not meet splits only one of them: the smaller operand is gathered.

    Args:
        numbers: `dimension_numbers`.
        nbytes: of each operand on a device.
    """
    (left_contract, right_contract), (left_batch, right_batch) = numbers
    pairs = [*zip(left_contract, right_contract, strict=True), *zip(left_batch, right_batch, strict=True)]
    meeting = {axis for i, j in pairs for axis in set(left[i]) & set(right[j])}
    clashing = (axes_of(left) & axes_of(right)) - meeting
    gathered = (clashing, set()) if nbytes[0] <= nbytes[1] else (set(), clashing)
    left, right = without(left, gathered[0]), without(right, gathered[1])
    summed = {axis for i, j in zip(left_contract, right_contract, strict=True) for axis in (*left[i], *right[j])}
    batch = [merged([(left[i],), (right[j],)])[0] for i, j in zip(left_batch, right_batch, strict=True)]
    free_left = [left[i] for i in range(len(left)) if i not in (*left_contract, *left_batch)]
    free_right = [right[j] for j in range(len(right)) if j not in (*right_contract, *right_batch)]
    return (*batch, *free_left, *free_right), summed, gathered
