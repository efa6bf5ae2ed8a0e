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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from mlt.errors import UserError
from mlt.model.lm import LM
from mlt.nn.param import named_leaves
from mlt.parallel.rules import Rules
from mlt.train.background import Task, Worker
from mlt.train.hashing import DISTINCT_FIELD, distinct_field
from mlt.train.residents import TABLE, Resident, check_host_memory, with_leaves
from mlt.train.state import TrainState

Batch = Mapping[str, np.ndarray]
Rows = dict[str, Any]
"""Arrays of a table and of its optimizer's slots by name (`residents.TABLE`)."""


class HostTables:
    """The tables of a run that lie in host memory, and what travels between them and the devices. Without any, it does nothing.

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
            UserError: the run has several processes, or this machine has less memory than the tables need.
        """
        if tables and jax.process_count() > 1:
            raise UserError(
                f"{tables[0].parameter} is to stay in host memory (table_on='host'), and this run has {jax.process_count()} "
                "processes, each with a host of its own; use one process, or table_on='device', which splits it over mesh.fsdp"
            )
        check_host_memory(tables)
        self.tables, self._seed = tables, seed
        self._values: dict[str, dict[str, np.ndarray]] = {}
        self._last: dict[str, np.ndarray] = {}  # rows of the batch of the newest step, ascending
        self._worker = Worker("mlt-tables") if tables else None
        self._writes: list[Task] = []
        self._places = {one.parameter: one.places(rules) for one in tables}
        self._carry = {
            one.parameter: jax.jit(functools.partial(_carry, one), out_shardings=self._places[one.parameter]) for one in tables
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
            given = arrays[one.parameter]
            if given[TABLE].shape == one.spec.shape:
                # What JAX shows of an array on a CPU is read-only; these are written to.
                self._values[one.parameter] = {name: np.array(array) for name, array in given.items()}
            else:
                drawn = {name: np.zeros(shape, np.float32) for name, shape in one.shapes(one.spec.shape[-2]).items()}
                drawn[TABLE] = np.ascontiguousarray(one.spec.make(self._seed, one.parameter))
                self._values[one.parameter] = drawn
            empty[one.parameter] = jax.tree.map(jax.device_put, self._blank(one), self._places[one.parameter])
        return _replaced(state, empty)

    def whole(self, state: TrainState) -> TrainState:
        """The state as a checkpoint holds it, with a copy of every table, all steps written back."""
        if not self.tables:
            return state
        self._settle(0)
        where = _host()
        put = lambda array: jax.device_put(np.copy(array), where)  # noqa: E731
        return _replaced(state, {name: jax.tree.map(put, rows) for name, rows in self._values.items()})

    def whole_abstract(self, abstract: TrainState) -> TrainState:
        """Shapes and places of what `whole` gives."""
        if not self.tables:
            return abstract
        make = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=_host())
        return _replaced(
            abstract,
            {one.parameter: {name: make(shape) for name, shape in one.shapes(one.spec.shape[-2]).items()} for one in self.tables},
        )

    def enter(self, state: TrainState, batch: Batch) -> tuple[TrainState, Batch]:
        """(the state with the rows that the batch reads, the batch without what only the host needs), for the next step."""
        if not self.tables:
            return state, batch
        # All but the newest step are in the host's tables; what that one changes comes from the devices.
        self._settle(1)
        old, new = _read(state, self.tables), {}
        for one in self.tables:
            rows_U, before_U = batch[distinct_field(one.layer)], self._last.get(one.parameter)
            carried = np.full(one.held, -1, np.int32)
            if before_U is not None and before_U.size:
                at = np.minimum(before_U.searchsorted(rows_U), before_U.size - 1)
                carried[: rows_U.size] = np.where(before_U[at] == rows_U, at, -1)
            fetched = jax.tree.map(jax.device_put, self._gathered(one, rows_U), self._places[one.parameter])
            new[one.parameter] = self._carry[one.parameter](old[one.parameter], fetched, carried)
            self._last[one.parameter] = rows_U
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
            values = self._gathered(one, batch[distinct_field(one.layer)])[TABLE]
            rows[one.parameter] = jax.device_put(values, self._places[one.parameter][TABLE])
        return with_leaves(model, rows), _for_devices(batch)

    def _gathered(self, one: Resident, rows_U: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of the table and of its slots, zeros behind the last."""
        found = self._blank(one)
        for name, array in self._values[one.parameter].items():
            found[name][one.at(name, slice(0, rows_U.size))] = array[one.at(name, rows_U)]
        return found

    def _write(self, made: dict[str, Rows], last: dict[str, np.ndarray]) -> None:
        for one in self.tables:
            rows_U = last[one.parameter]
            for name, array in self._values[one.parameter].items():
                array[one.at(name, rows_U)] = np.asarray(made[one.parameter][name])[one.at(name, slice(0, rows_U.size))]

    def _blank(self, one: Resident) -> dict[str, np.ndarray]:
        return {name: np.zeros(shape, np.float32) for name, shape in one.shapes(one.held).items()}

    def _settle(self, left: int) -> None:
        """Wait until at most the newest `left` steps are still to be written back."""
        while len(self._writes) > left:
            self._writes.pop(0).result()


def _carry(one: Resident, old: Rows, fetched: Rows, carried_U: jax.Array) -> Rows:
    """The fetched rows, but those that the last batch had too as the devices have them."""

    def pick(name: str) -> jax.Array:
        known = carried_U >= 0
        return jnp.where(known[:, None] if one.is_wide(name) else known, old[name][one.at(name, carried_U)], fetched[name])

    return {name: pick(name) for name in fetched}


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


def _host() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def _for_devices(batch: Batch) -> Batch:
    return {name: array for name, array in batch.items() if not name.startswith(DISTINCT_FIELD)}
