"""What a program holds of a device's memory, operation by operation."""

import dataclasses

import numpy as np

from mlt.plan.splits import Split


@dataclasses.dataclass(eq=False)
class Store:
    """Bytes of a device.

    Attributes:
        nbytes: on one device.
        shape: of the whole array, for people.
        made: whether it exists; else it is made where it is used, from `sources`, by reading so many bytes (`reads`).
        born, last: places in the order of its region.
        region: where it was made; None is the program's own input.
        host: whether it lies in the host's memory, and takes nothing of the device.
    """

    nbytes: int
    shape: tuple[int, ...]
    made: bool
    sources: frozenset["Store"] = frozenset()
    reads: int = 0
    born: int = 0
    last: int = 0
    region: "Region | None" = None
    host: bool = False


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program: whole shape (a device's own inside `shard_map`), item size, split, bytes.

    Attributes:
        parts: mesh axes over whose devices it is still to be summed.
    """

    shape: tuple[int, ...]
    itemsize: int
    split: Split
    store: Store
    parts: frozenset[str] = frozenset()


@dataclasses.dataclass
class Held:
    """The most that is held at one moment.

    Attributes:
        nbytes: beside the program's inputs.
        stores: what is alive, outer regions first, with how deep in loops it lies.
        source: where in the traced program.
    """

    nbytes: int = 0
    stores: list[tuple[int, Store]] = dataclasses.field(default_factory=list)
    source: str = ""


class Region:
    """A run of operations with one order: the program, or the body of a loop."""

    def __init__(self, depth: int) -> None:
        self.time, self.depth = 0, depth
        self.stores: list[Store] = []
        self.gathered: dict[tuple[Store, Split], Value] = {}
        self.inner: list[tuple[int, Held]] = []
        self.sources: list[str] = [""]

    def held(self) -> Held:
        """The moment with the most bytes."""
        change = np.zeros(self.time + 2, np.int64)
        for store in self.stores:
            change[store.born] += store.nbytes
            change[max(store.last, store.born) + 1] -= store.nbytes
        alive = np.cumsum(change)
        inside: dict[int, Held] = {}
        for time, held in self.inner:
            if held.nbytes > inside.get(time, Held(-1)).nbytes:
                inside[time] = held
        for time, held in inside.items():
            alive[time] += held.nbytes
        at = int(np.argmax(alive))
        stores = [(self.depth, s) for s in self.stores if s.born <= at <= max(s.last, s.born)]
        within = inside.get(at, Held())
        source = within.source or self.sources[min(at, len(self.sources) - 1)]
        return Held(int(alive[at]), stores + within.stores, source)


def bytes_to_read(store: Store) -> int:
    """Bytes to read for what is computed from it."""
    return store.nbytes if store.made else store.reads
