"""Global batches from what each process loads: its own rows, and no others."""

from collections.abc import Mapping

import jax
import numpy as np

from mlt.parallel.rules import Rules


class Feed:
    """Puts a process's rows of a batch on its devices as part of the global batch.

    Attributes:
        places: rows of the global batch that this process's devices hold, ascending. Processes whose devices share rows,
            as where the heads are split between them, each load these rows.
    """

    def __init__(self, rules: Rules, rows: int, length: int) -> None:
        sharding = rules.sharding(("batch", "seq"))
        if sharding is None:
            raise ValueError("a batch is put on the devices of a mesh; these rules have none")
        self.sharding = sharding
        self._shape = (rows, length)
        held = self.sharding.addressable_devices_indices_map(self._shape).values()
        slices = [index[0].indices(rows) for index in held if index is not None]
        self.places = tuple(sorted({row for part in slices for row in range(*part)}))

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Arrays of the whole batch (rows, length, ...) from this process's rows of it (len(places), length, ...)."""
        if jax.process_count() == 1:
            return jax.device_put(dict(batch), self.sharding)
        return {name: self._place(array) for name, array in batch.items()}

    def _place(self, array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(self._shape[0])
            first = self.places.index(start)
            return array[first : first + stop - start, index[1]]

        return jax.make_array_from_callback((*self._shape, *array.shape[2:]), self.sharding, part)
