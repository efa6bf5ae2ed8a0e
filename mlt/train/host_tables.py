"""Tables that stay in host memory: the devices hold the rows of one batch, the host everything else.

A step is compiled for a small table, as many rows as a batch can read at most, with an optimizer state of that size. Before
it runs, the rows that its batch reads and their state are put there, and its ids count them; what it made of them goes back
afterwards. So the program and its arithmetic are those of a table on the devices, and with them the result.

A step is handed to the devices before the one in front of it is done. While that one runs, a thread of its own waits for the
step before it and writes its rows back into the host's table, and then the rows of the next batch are collected. Of those, the
ones that the running step reads too would be one step old: the devices take them from what that step makes, in a small program
between the two. So no step waits for the host, unless collecting and writing back takes longer than a step.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from mlt.model.lm import LM
from mlt.nn.param import named_leaves, put
from mlt.parallel.local import local
from mlt.parallel.rules import Rules
from mlt.train.background import Task, Worker
from mlt.train.hashing import DISTINCT_FIELD, distinct_field
from mlt.train.host_parts import Parts, part_of, parts_of, whole_from, within_part
from mlt.train.residents import TABLE, Resident, check_host_memory, check_parts, with_leaves
from mlt.train.state import TrainState

Batch = Mapping[str, np.ndarray]
Rows = dict[str, Any]
"""Arrays of a table and of its optimizer's slots by name (`residents.TABLE`)."""


class HostTables:
    """The tables of a run that lie in host memory, and what travels between them and the devices. Without any, it does nothing.

    A process holds its part of each (`host_parts`), all of it where it is the only one, and speaks to its own devices alone.

    Attributes:
        tables: their descriptions.
    """

    def __init__(self, tables: list[Resident], rules: Rules, seed: int = 0):
        """Read nothing, make nothing.

        Args:
            tables: what `residents` gives.
            rules: layout of the rows on the devices.
            seed: of the run.

        Raises:
            UserError: this machine has less memory than the tables need, or they cannot be split as the run is.
        """
        check_host_memory(tables)
        check_parts(tables)
        self.tables, self._seed, self._rules = tables, seed, rules
        self._parts = parts_of(rules) if tables else Parts(((0,),), 0)
        self._values: dict[str, dict[str, np.ndarray]] = {}
        self._last: dict[str, _Batch] = {}  # of the newest step
        self._worker = Worker("mlt-tables") if tables else None
        self._writes: list[Task] = []
        self._places = {one.parameter: one.places(rules) for one in tables}
        self._carry = {
            one.parameter: jax.jit(functools.partial(_carry, one, rules), out_shardings=self._places[one.parameter])
            for one in tables
        }

    def begin(self, state: TrainState) -> TrainState:
        """Fill the host's tables from a restored state, or draw them as a new run does where the state is a fresh one.

        Returns:
            The state for the devices.
        """
        if not self.tables:
            return state
        self._settle(0)
        self._last.clear()
        arrays, empty = _read(state, self.tables), {}
        for one in self.tables:
            given, (start, stop) = arrays[one.parameter], self._rows(one)
            if given[TABLE].shape == one.spec.shape:
                held = {name: part_of(array, one.rows_dim, start, stop) for name, array in given.items()}
            else:
                held = {name: np.zeros(shape, np.float32) for name, shape in one.shapes(stop - start).items()}
                held[TABLE] = np.ascontiguousarray(one.spec.make_rows(self._seed, one.parameter, start, stop))
            self._values[one.parameter] = held
            empty[one.parameter] = self._put(one, self._blank(one))
        return _replaced(state, empty)

    def whole(self, state: TrainState) -> TrainState:
        """The state as a checkpoint holds it, with a copy of every table, all steps written back."""
        if not self.tables:
            return state
        self._settle(0)
        rows: dict[str, Rows] = {}
        for one in self.tables:
            whole, (start, _) = one.shapes(one.spec.shape[-2]), self._rows(one)
            copy = lambda name, array, one=one, whole=whole, start=start: whole_from(  # noqa: E731
                np.copy(array), whole[name], one.rows_dim, start, self._in_hosts(one, name)
            )
            rows[one.parameter] = {name: copy(name, array) for name, array in self._values[one.parameter].items()}
        return _replaced(state, rows)

    def whole_abstract(self, abstract: TrainState) -> TrainState:
        """Shapes and places of what `whole` gives."""
        if not self.tables:
            return abstract
        make = lambda one, name, shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._in_hosts(one, name))  # noqa: E731
        return _replaced(
            abstract,
            {
                one.parameter: {name: make(one, name, shape) for name, shape in one.shapes(one.spec.shape[-2]).items()}
                for one in self.tables
            },
        )

    def enter(self, state: TrainState, batch: Batch) -> tuple[TrainState, Batch]:
        """(the state with the rows that the batch reads, the batch without what only the host needs), for the next step."""
        if not self.tables:
            return state, batch
        # All but the newest step are in the host's tables; what that one changes comes from the devices.
        self._settle(1)
        old, new = _read(state, self.tables), {}
        for one in self.tables:
            now, before = _Batch.of(one, batch), self._last.get(one.parameter)
            carried = np.full(one.room, -1, np.int32)
            if before is not None and before.rows_U.size:
                at = np.minimum(before.rows_U.searchsorted(now.rows_U), before.rows_U.size - 1)
                carried[now.positions_U] = np.where(before.rows_U[at] == now.rows_U, before.positions_U[at], -1)
            fetched = self._put(one, self._gathered(one, now))
            carried = put(carried, self._rules.sharding(("memory",)))
            new[one.parameter] = self._carry[one.parameter](old[one.parameter], fetched, carried)
            self._last[one.parameter] = now
        return _replaced(state, new), _for_devices(batch)

    def leave(self, state: TrainState) -> None:
        """Begin to write back what a step made of the rows of its batch."""
        if not self.tables or self._worker is None:
            return
        made, last = _read(state, self.tables), dict(self._last)
        self._writes.append(self._worker.do(lambda: self._write(made, last)))

    def enter_evaluation(self, model: LM, batch: Batch) -> tuple[LM, Batch]:
        """(the model with the rows that a batch reads, the batch for the devices); changes nothing."""
        if not self.tables:
            return model, batch
        self._settle(0)
        rows = {}
        for one in self.tables:
            values = self._gathered(one, _Batch.of(one, batch))[TABLE]
            rows[one.parameter] = self._put(one, {TABLE: values})[TABLE]
        return with_leaves(model, rows), _for_devices(batch)

    def _held(self, one: Resident) -> range:
        """Parts that are here: this process's, or all where no other process holds any."""
        return range(one.hosts) if self._parts.count == 1 else range(self._parts.own, self._parts.own + 1)

    def _rows(self, one: Resident) -> tuple[int, int]:
        """[first, last) row of the table that is here."""
        held = self._held(one)
        return held.start * one.own_rows, held.stop * one.own_rows

    def _in_hosts(self, one: Resident, name: str) -> jax.sharding.Sharding:
        """Where the parts of an array lie in the memory of the hosts."""
        if jax.process_count() == 1:
            return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        return self._parts.sharding(len(one.shapes(1)[name]), one.rows_dim)

    def _put(self, one: Resident, arrays: dict[str, np.ndarray]) -> Rows:
        """What is here of the rows on the devices, as arrays of the run."""
        shapes, places, first = one.shapes(one.room), self._places[one.parameter], self._held(one).start * one.held
        return {name: whole_from(own, shapes[name], one.rows_dim, first, places[name]) for name, own in arrays.items()}

    def _gathered(self, one: Resident, batch: "_Batch") -> dict[str, np.ndarray]:
        """Rows of the table and of its slots that are here, at their positions; zeros elsewhere."""
        found, (here, positions) = self._blank(one), self._own(one, batch)
        for name, array in self._values[one.parameter].items():
            found[name][one.at(name, positions)] = array[one.at(name, here)]
        return found

    def _write(self, made: dict[str, Rows], last: "dict[str, _Batch]") -> None:
        for one in self.tables:
            here, positions = self._own(one, last[one.parameter])
            held = self._held(one)
            for name, array in self._values[one.parameter].items():
                rows = part_of(made[one.parameter][name], one.rows_dim, held.start * one.held, held.stop * one.held)
                array[one.at(name, here)] = rows[one.at(name, positions)]

    def _own(self, one: Resident, batch: "_Batch") -> tuple[np.ndarray, np.ndarray]:
        """(rows of a batch that are here, counted from the first one here; their places, likewise)."""
        start, stop = self._rows(one)
        mine = slice(*batch.rows_U.searchsorted((start, stop)))
        return batch.rows_U[mine] - start, batch.positions_U[mine] - self._held(one).start * one.held

    def _blank(self, one: Resident) -> dict[str, np.ndarray]:
        return {name: np.zeros(shape, np.float32) for name, shape in one.shapes(one.held * len(self._held(one))).items()}

    def _settle(self, left: int) -> None:
        """Wait until at most the newest `left` steps are still to be written back."""
        while len(self._writes) > left:
            self._writes.pop(0).result()


class _Batch(NamedTuple):
    """Rows of a table that a batch reads, ascending, and their positions among those on the devices."""

    rows_U: np.ndarray
    positions_U: np.ndarray

    @classmethod
    def of(cls, one: Resident, batch: Batch) -> "_Batch":
        rows_U = batch[distinct_field(one.layer)]
        return cls(rows_U, one.positions_of(rows_U))


def _carry(one: Resident, rules: Rules, old: Rows, fetched: Rows, carried: jax.Array) -> Rows:
    """The fetched rows, but those that the last batch had too as the devices have them. A row never leaves its part."""
    names = tuple(fetched)
    own_part, of_part = within_part(rules, one.hosts)

    def run(carried_U: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        def pick(name: str, old: jax.Array, fetched: jax.Array) -> jax.Array:
            before = of_part(old, one.rows_dim)
            at = carried_U - own_part() * before.shape[one.rows_dim]
            known = carried_U >= 0
            return jnp.where(known[:, None] if one.is_wide(name) else known, before[one.at(name, at)], fetched)

        return tuple(pick(*each) for each in zip(names, arrays[: len(names)], arrays[len(names) :], strict=True))

    axes = tuple(one.axes(name) for name in names)
    mapped = local(run, rules, (("memory",), *axes, *axes), axes)
    return dict(zip(names, mapped(carried, *(old[name] for name in names), *(fetched[name] for name in names)), strict=True))


def _read(state: TrainState, tables: list[Resident]) -> dict[str, Rows]:
    leaves = dict(named_leaves(state.model))
    slots = state.optimizer["tables"]
    return {
        one.parameter: {TABLE: leaves[one.parameter], **{name: slots[name][one.parameter] for name in one.slots()}}
        for one in tables
    }


def _replaced(state: TrainState, rows: dict[str, Rows]) -> TrainState:
    """The state with other arrays of tables and slots."""
    tables = {slot: dict(held) for slot, held in state.optimizer["tables"].items()}
    for parameter, arrays in rows.items():
        for name, array in arrays.items():
            if name != TABLE:
                tables[name][parameter] = array
    model = with_leaves(state.model, {parameter: arrays[TABLE] for parameter, arrays in rows.items()})
    return dataclasses.replace(state, model=model, optimizer={**state.optimizer, "tables": tables})


def _for_devices(batch: Batch) -> Batch:
    return {name: array for name, array in batch.items() if not name.startswith(DISTINCT_FIELD)}
