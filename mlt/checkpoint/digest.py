"""A 32-bit digest of every array of a state: the proof that what was read is what was written.

The storage layer does not notice a flipped bit inside an array, so each leaf is hashed over its bits when it is
saved and again when it is restored. The digest of an array is

    sum over words w of mix(w, index of w)   mod 2**32

with `index` the position in the whole logical array. Integer sums do not depend on their order, so the digest does
not depend on the sharding, the mesh or the number of processes. Arrays in host memory are hashed with numpy (nothing
to compile), arrays in device memory on their devices (nothing to transfer); both give the same number.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

_GOLDEN, _FIRST, _SECOND = (np.uint32(c) for c in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D))
_CHUNK_ELEMENTS = 1 << 20  # bounds the temporaries of the numpy path to a few megabytes


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Hash every array over its bits.

    Args:
      arrays: path -> array of bool, integer, floating or complex type, any shape and sharding. In a run of several
        processes all of them call this with the same paths.

    Returns:
      path -> eight hexadecimal digits, the same on every process and for every sharding.

    Raises:
      TypeError: an array has elements that are not whole bytes.
    """
    found: dict[str, Any] = {path: _device_digest(x) for path, x in arrays.items() if not in_host_memory(x)}
    parts = {path: _host_part(x) for path, x in arrays.items() if path not in found}
    if parts and jax.process_count() > 1:
        gathered = np.asarray(multihost_utils.process_allgather(np.array(list(parts.values()), np.uint32)))
        parts = {path: np.sum(gathered[:, index], dtype=np.uint32) for index, path in enumerate(parts)}
    found |= parts
    return {path: text_of(int(found[path])) for path in arrays}


def part_digest(part: np.ndarray, starts: Sequence[int], shape: tuple[int, ...]) -> int:
    """Hash a part of an array; the parts' numbers add up to the array's, mod 2**32.

    Args:
      part: its values, which begin at index `starts` of the whole.
      starts: one index for each dim.
      shape: of the whole.
    """
    return int(_numpy_digest(part, list(starts), _strides(shape)))


def text_of(digest: int) -> str:
    """Give a digest as it is recorded."""
    return f"{digest & 0xFFFFFFFF:08x}"


def in_host_memory(array: jax.Array) -> bool:
    """Tell whether an array lies where numpy can see it without a transfer."""
    device = next(iter(array.sharding.device_set))
    return device.platform == "cpu" or array.sharding.memory_kind in ("pinned_host", "unpinned_host")


def _mix(word: Any, index: Any) -> Any:
    """Hash uint32 words with their positions, numpy or jax alike."""
    mixed = (word ^ (index * _GOLDEN)) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint32(15))) * _SECOND
    return mixed ^ (mixed >> np.uint32(13))


def _words_per_element(dtype: np.dtype) -> int:
    if dtype.itemsize not in (1, 2, 4, 8, 16) or dtype.name.startswith(("int2", "int4", "uint2", "uint4", "float4")):
        raise TypeError(f"a checkpoint holds arrays of whole-byte elements, not {dtype}")
    return max(1, dtype.itemsize // 4)


@jax.jit
def _device_digest(array: jax.Array) -> jax.Array:
    count = _words_per_element(array.dtype)
    if array.size == 0:
        return jnp.uint32(0)
    index = jnp.uint32(0)
    for dim, stride in enumerate(_strides(array.shape)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim) * stride
    index = index * np.uint32(count)
    total = jnp.uint32(0)
    for position, word in enumerate(_device_words(array)):
        total = total + jnp.sum(_mix(word, index + np.uint32(position)), dtype=jnp.uint32)
    return total


def _device_words(array: jax.Array) -> Iterator[jax.Array]:
    if jnp.iscomplexobj(array):
        yield from _device_words(array.real)
        yield from _device_words(array.imag)
    elif array.dtype == jnp.bool_:
        yield array.astype(jnp.uint32)
    elif array.dtype.itemsize == 8:
        pairs = jax.lax.bitcast_convert_type(array, jnp.uint32)
        yield from (pairs[..., 0], pairs[..., 1])
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
        yield jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _host_part(array: jax.Array) -> np.uint32:
    """The share of this process in the digest: its shards, each part of the array counted once."""
    total = np.uint32(0)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            starts = [part.start or 0 for part in shard.index]
            part = _numpy_digest(np.asarray(shard.data), starts, _strides(array.shape))
            total = np.add(total, part, dtype=np.uint32)
    return total


def _numpy_digest(array: np.ndarray, starts: list[int], strides: list[np.uint32]) -> np.uint32:
    count = _words_per_element(array.dtype)
    if array.size == 0:
        return np.uint32(0)
    chunked = next((dim for dim, size in enumerate(array.shape) if size > 1), None)
    if array.size > _CHUNK_ELEMENTS and chunked is not None:
        parts = []
        for part in np.array_split(array, min(array.shape[chunked], -(-array.size // _CHUNK_ELEMENTS)), axis=chunked):
            parts.append(_numpy_digest(part, starts, strides))
            starts = [start + part.shape[chunked] * (dim == chunked) for dim, start in enumerate(starts)]
        return np.sum(np.array(parts), dtype=np.uint32)
    index = np.zeros((1,) * array.ndim, np.uint32)
    for dim, (start, stride) in enumerate(zip(starts, strides, strict=True)):
        along = (np.arange(start, start + array.shape[dim]) & 0xFFFFFFFF).astype(np.uint32) * stride
        index = index + along.reshape([-1 if other == dim else 1 for other in range(array.ndim)])
    unsigned = np.dtype(f"u{min(array.dtype.itemsize, 4)}")
    words = np.ascontiguousarray(array).reshape(-1).view(unsigned).reshape(*array.shape, count)
    positions = index[..., None] * np.uint32(count) + np.arange(count, dtype=np.uint32)
    return np.sum(_mix(words.astype(np.uint32), positions), dtype=np.uint32)


def _strides(shape: tuple[int, ...]) -> list[np.uint32]:
    """Row-major strides in elements, mod 2**32."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(np.uint32(stride & 0xFFFFFFFF))
        stride *= size
    return strides[::-1]
