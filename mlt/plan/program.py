"""What a traced program does on one device of a mesh: products, bytes moved, what crosses devices, and the most it holds.

The program is walked in order, without compiling it. Elementwise operations are taken into what uses them, as XLA's fusion
does: they hold nothing until a product, a loop or a kernel reads them. Arrays live from where they are made to their last use;
a loop holds what its body holds, once. Shapes inside `shard_map` are a device's own; outside, splits are followed
(`plan/splits.py`).
"""

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core

from mlt.plan import primitives, splits
from mlt.plan.held import Held, Region, Store, Value, bytes_to_read
from mlt.plan.splits import Sizes, Split


@dataclasses.dataclass
class Tally:
    """What one device does in one run.

    Attributes:
        kernels: (FLOPs of products, bytes read and written) -> how often.
        crossings: (kind, mesh axes) -> bytes that a device receives.
        opaque: calls whose inside is not known, and how often.
        unknown_loops: loops whose rounds are not known; they count once.
    """

    kernels: Counter[tuple[float, float]] = dataclasses.field(default_factory=Counter)
    crossings: Counter[tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=Counter)
    opaque: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: int = 0

    @property
    def flops(self) -> float:
        return sum(flops * times for (flops, _), times in self.kernels.items())

    @property
    def moved(self) -> float:
        return sum(moved * times for (_, moved), times in self.kernels.items())


class Program:
    """Walks one program.

    Args:
        sizes: shards along each mesh axis.
        parameters: shape -> split of each trained parameter, and of one layer of it where layers are stacked: a sum over
            devices with such a shape is a gradient, and is scattered as the parameter lies.
        copies_gradients: XLA for GPUs makes a stack of gradients with the split dim first, and copies it into the order of the
            parameter's dims in front of the optimizer.
    """

    def __init__(self, sizes: Sizes, parameters: Mapping[tuple[int, ...], Split], *, copies_gradients: bool = False) -> None:
        self.sizes, self.parameters, self.copies_gradients = sizes, parameters, copies_gradients
        self.tally, self.region = Tally(), Region(0)
        self._times, self._local = 1, False
        self._copies: list[tuple[Store, Store]] = []

    def run(self, program: jax.extend.core.ClosedJaxpr, inputs: Sequence[Split]) -> Held:
        """The most it holds beside its inputs; the rest is in `tally`.

        Args:
            inputs: the split of each input.
        """
        given = []
        for var, split in zip(program.jaxpr.invars, inputs, strict=True):
            store = Store(self._nbytes(var.aval, split), var.aval.shape, True)
            given.append(self._value(var.aval, split, store))
        for value in self._walk(program.jaxpr, program.consts, given):
            self._end(value)
        for gradient, copy in self._copies:
            copy.last = gradient.last
        return self.region.held()

    # What a device holds.

    def _nbytes(self, aval: Any, split: Split) -> int:
        return math.prod(splits.local_shape(aval.shape, split, self.sizes)) * _itemsize(aval)

    def _value(self, aval: Any, split: Split, store: Store) -> Value:
        return Value(tuple(aval.shape), _itemsize(aval), split, store)

    def _make(self, aval: Any, split: Split) -> Value:
        now = self.region.time
        store = Store(self._nbytes(aval, split), aval.shape, True, born=now, last=now, region=self.region)
        self.region.stores.append(store)
        return self._value(aval, split, store)

    def _fused(self, aval: Any, split: Split, operands: Sequence[Value], *, part: bool = False) -> Value:
        """Not made yet. `part`: of the operands only as much is read as the result has."""
        sources = frozenset().union(*({v.store} if v.store.made else v.store.sources for v in operands))
        nbytes, reads = self._nbytes(aval, split), sum(bytes_to_read(v.store) for v in operands)
        store = Store(nbytes, aval.shape, False, sources, min(reads, nbytes) if part else reads, region=self.region)
        return self._value(aval, split, store)

    def _read(self, *values: Value) -> None:
        """Make what is read, if it does not exist, and keep it until now."""
        for store in (value.store for value in values):
            if not store.made:
                self._charge(0, store.nbytes + store.reads)
                self._touch(*store.sources)
                store.made, store.sources, store.born = True, frozenset(), self.region.time
                store.region = self.region
                self.region.stores.append(store)
            self._touch(store)

    def _touch(self, *stores: Store) -> None:
        for store in stores:
            if store.region is not None:
                store.last = store.region.time

    def _end(self, value: Value) -> None:
        """A result that is written where its like already lies: an updated parameter, a slice of a stacked array."""
        self._parts("end", [value])
        if value.store.made:
            self._touch(value.store)
        else:
            self._charge(0, value.store.nbytes + value.store.reads)
            self._touch(*value.store.sources)

    def _charge(self, flops: float, moved: float) -> None:
        self.tally.kernels[(float(flops), float(moved))] += self._times

    def _cross(self, kind: str, axes: Sequence[str] | set[str], nbytes: float) -> None:
        """`nbytes` is the larger of what a device gives and gets."""
        axes = tuple(sorted(axis for axis in axes if self.sizes[axis] > 1))
        n = splits.shards(axes, self.sizes)
        if n > 1:
            share = 1.0 if kind == "collective-permute" else (n - 1) / n * (2 if kind == "all-reduce" else 1)
            self.tally.crossings[(kind, axes)] += share * nbytes * self._times

    # The walk.

    def _walk(self, jaxpr: Any, consts: Sequence[Any], given: Sequence[Value]) -> list[Value]:
        known: dict[Any, Value] = dict(zip(jaxpr.invars, given, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            split = splits.whole(len(var.aval.shape))
            # A constant of the program lies beside its inputs.
            known[var] = const if isinstance(const, Value) else self._value(var.aval, split, Store(0, var.aval.shape, True))

        def value(atom: Any) -> Value:
            if isinstance(atom, jax.extend.core.Literal):
                return self._fused(atom.aval, splits.whole(len(atom.aval.shape)), ())
            return known[atom]

        for eqn in jaxpr.eqns:
            self.region.time += 1
            self.region.sources.append(primitives.source(eqn))
            for var, result in zip(eqn.outvars, self._do(eqn, [value(x) for x in eqn.invars]), strict=True):
                known[var] = result
        return [value(x) for x in jaxpr.outvars]

    def _do(self, eqn: Any, operands: list[Value]) -> list[Value]:
        name, outs = eqn.primitive.name, [var.aval for var in eqn.outvars]
        parts = self._parts(name, operands, [_itemsize(aval) for aval in outs])
        results = self._done(eqn, name, operands, outs)
        for result in results:
            result.parts = result.parts | parts
        return results

    def _parts(self, name: str, operands: list[Value], widths: Sequence[int] = ()) -> frozenset[str]:
        """Sums over devices wait as long as the same may be done to their parts; what cannot wait is summed here.

        Args:
            widths: item sizes of the results; a sum does not wait to be sent in a wider type.
        """
        found = {v.parts for v in operands}
        if not any(found) or name in primitives.CALLS:
            return frozenset()
        wider = any(width > v.itemsize for width in widths for v in operands)
        if len(found) == 1 and not wider and (name in primitives.PASSED_ON or name in primitives.SUMS):
            return found.pop()
        for value in operands:
            self._cross("all-reduce", value.parts, value.store.nbytes)
            value.parts = frozenset()
        return frozenset()

    def _done(self, eqn: Any, name: str, operands: list[Value], outs: list[Any]) -> list[Value]:
        if name in _STRUCTURED:
            return getattr(self, _STRUCTURED[name])(eqn, operands)
        called = primitives.called(eqn)
        if called is not None:
            return self._walk(called.jaxpr, called.consts, operands)
        if name in primitives.COLLECTIVES:
            return self._collective(eqn, operands, outs)
        if name == "device_put" and (moved := primitives.memory_of(eqn)) is not None:
            return [self._to_memory(v, aval, moved) for v, aval in zip(operands, outs, strict=True)]
        if name in primitives.ALIASES:
            return [self._moved_over(eqn, v, aval) for v, aval in zip(operands, outs, strict=False)]
        if name in primitives.FUSED:
            split = self._split(eqn, operands, outs[0])
            return [self._fused(aval, split, operands, part=name in primitives.PARTS) for aval in outs]
        if name in primitives.REDUCTIONS:
            return self._reduction(eqn, operands, outs)
        self._read(*operands)
        if name in primitives.IN_PLACE:
            target, update = operands[0], operands[2 if name.startswith("scatter") else 1]
            self._charge(0, 3 * update.store.nbytes)
            free = target.store.region is not None
            return [self._value(outs[0], target.split, target.store) if free else self._make(outs[0], target.split)]
        made = [self._make(aval, self._split(eqn, operands, aval)) for aval in outs]
        written = sum(v.store.nbytes for v in made)
        read = sum(v.store.nbytes for v in operands)
        flops = 0.0
        if name in primitives.OPAQUE:
            self.tally.opaque[str(eqn.params.get("name_and_src_info", name)).split(" at ")[0]] += self._times
        if name == "ragged_dot_general":
            (rows, inner), (*_, columns) = operands[0].shape[-2:], operands[1].shape
            flops = 2.0 * rows * inner * columns
        self._charge(flops, read + written)
        return made

    def _split(self, eqn: Any, operands: list[Value], out: Any) -> Split:
        rank = len(out.shape)
        if self._local or not operands:
            return splits.whole(rank)
        first, name = operands[0], eqn.primitive.name
        if name == "broadcast_in_dim":
            return splits.broadcast(first.split, first.shape, out.shape, eqn.params["broadcast_dimensions"])
        if all(v.shape == out.shape for v in operands if v.shape):
            alike = [v.split for v in operands if v.shape]
            return splits.merged(alike) if alike else splits.whole(rank)
        return splits.by_position([v.split for v in operands], [v.shape for v in operands], out.shape)

    def _moved_over(self, eqn: Any, value: Value, out: Any) -> Value:
        """The operand in other dims, or laid out otherwise."""
        name, split = eqn.primitive.name, value.split
        if self._local:
            split = splits.whole(len(out.shape))
        elif name == "transpose":
            split = tuple(split[i] for i in eqn.params["permutation"])
        elif name in ("sharding_constraint", "reshard"):
            where = eqn.params["sharding" if name == "sharding_constraint" else "dst_sharding"]
            wanted = splits.effective(splits.from_spec(where.spec, len(out.shape)), self.sizes)
            return self._laid_out(value, out, wanted)
        elif value.shape != tuple(out.shape):
            split = splits.reshaped(split, value.shape, out.shape, self.sizes)
        return self._value(out, split, value.store)

    def _to_memory(self, value: Value, out: Any, host: bool) -> Value:
        """Offloaded to the host's memory, where it takes nothing of the device, or back from there."""
        self._read(value)
        made = self._make(out, value.split)
        self.tally.crossings[("to the host" if host else "from the host", ())] += made.store.nbytes * self._times
        if host:
            made.store.nbytes, made.store.host = 0, True
        return made

    def _laid_out(self, value: Value, out: Any, wanted: Split) -> Value:
        """`value` split otherwise: gathered over the axes it loses, cut along those it gains."""
        lost = splits.axes_of(value.split) - splits.axes_of(wanted)
        if lost:
            self._read(value)
            # The compiler gathers once what a loop's body, or the program outside loops, reads more than once.
            made = self.region.gathered.get((value.store, wanted))
            if made is None:
                made = self._make(out, wanted)
                self.region.gathered[(value.store, wanted)] = made
                self._cross("all-gather", lost, made.store.nbytes)
            self._touch(made.store)
            return self._value(out, wanted, made.store)
        if wanted == value.split:
            return self._value(out, wanted, value.store)
        return self._fused(out, wanted, [value])

    def _reduction(self, eqn: Any, operands: list[Value], outs: list[Any]) -> list[Value]:
        dims, value = eqn.params["axes"], operands[0]
        split = tuple(d for i, d in enumerate(value.split) if i not in dims)
        summed = {axis for i in dims for axis in value.split[i]}
        self._touch(*(s for v in operands for s in ({v.store} if v.store.made else v.store.sources)))
        made = []
        for aval in outs:
            made.append(self._reduced(aval, self._make(aval, split), summed))
        read = sum(bytes_to_read(v.store) for v in operands)
        self._charge(0, read + sum(v.store.nbytes for v in made))
        return made

    def _product(self, eqn: Any, operands: list[Value]) -> list[Value]:
        self._read(*operands)
        left, right = operands
        out = eqn.outvars[0].aval
        numbers = eqn.params["dimension_numbers"]
        sizes = (left.store.nbytes, right.store.nbytes)
        split, summed, gathered = splits.product(left.split, right.split, numbers, sizes)
        read = 0
        for value, axes in zip(operands, gathered, strict=True):
            whole = value.store.nbytes
            if axes:
                whole = self._laid_out(
                    value, Described(value.shape, value.itemsize), splits.without(value.split, axes)
                ).store.nbytes
            read += whole
        contracted = math.prod(left.shape[i] for i in numbers[0][0]) / splits.shards(summed, self.sizes)
        result = self._make(out, split)
        flops = 2 * math.prod(splits.local_shape(out.shape, split, self.sizes)) * contracted
        self._charge(flops, read + result.store.nbytes)
        return [self._reduced(out, result, summed)]

    def _reduced(self, aval: Any, value: Value, summed: set[str]) -> Value:
        """A sum whose parts lie on devices: a gradient is scattered as its parameter lies, the rest waits."""
        if summed:
            target = self._gradient_split(aval.shape)
            scattered = splits.axes_of(target) & summed
            if scattered:
                self._cross("reduce-scatter", scattered, value.store.nbytes)
                value = self._make(aval, splits.merged([value.split, target]))
            value.parts = frozenset(summed - scattered)
        return value

    def _gradient_split(self, shape: Sequence[int]) -> Split:
        """How a parameter with these dims, in whatever order, lies; whole where none has them."""
        for known, split in self.parameters.items():
            if sorted(known) == sorted(shape):
                left = list(zip(known, split, strict=True))
                return tuple(left.pop(next(i for i, (n, _) in enumerate(left) if n == size))[1] for size in shape)
        return splits.whole(len(shape))

    def _collective(self, eqn: Any, operands: list[Value], outs: list[Any]) -> list[Value]:
        axes = eqn.params.get("axes", eqn.params.get("axis_name"))
        axes = (axes,) if isinstance(axes, str) else tuple(a for a in axes if isinstance(a, str))
        if splits.shards(axes, self.sizes) == 1:
            return [self._value(aval, v.split, v.store) for v, aval in zip(operands, outs, strict=True)]
        self._read(*operands)
        made = [self._make(aval, splits.whole(len(aval.shape))) for aval in outs]
        for value, result in zip(operands, made, strict=True):
            kind, nbytes = primitives.COLLECTIVES[eqn.primitive.name], max(value.store.nbytes, result.store.nbytes)
            scattered = splits.axes_of(self._gradient_split(value.shape)) & set(axes) if kind == "all-reduce" else set()
            if scattered:
                # What is kept of the sum is a part: the compiler scatters it.
                self._cross("reduce-scatter", scattered, nbytes)
                nbytes //= splits.shards(scattered, self.sizes)
            self._cross(kind, set(axes) - scattered, nbytes)
        return made

    # Loops, branches and local parts.

    def _scan(self, eqn: Any, operands: list[Value]) -> list[Value]:
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        consts, carries = primitives.scan_parts(eqn)
        self._read(*operands)
        fixed, start, stacked = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]
        taken = [
            self._fused(var.aval, v.split[1:], [v], part=True)
            for var, v in zip(body.jaxpr.invars[consts + carries :], stacked, strict=True)
        ]
        before = [v.split for v in start]
        if not self._local and _split_somewhere(operands):
            with self._unrecorded():
                first = self._body(body, [*fixed, *start, *taken], 0)
            before = [splits.merged([v.split, r.split]) for v, r in zip(start, first, strict=False)]
            taken = [
                self._fused(Described(v.shape, v.itemsize), v.split, [s], part=True) for v, s in zip(taken, stacked, strict=True)
            ]
        carried = [self._carry(v, split) for v, split in zip(start, before, strict=True)]
        results = self._body(body, [*fixed, *carried, *taken], length)
        outs: list[Value] = [self._value(var.aval, v.split, v.store) for var, v in zip(eqn.outvars, carried, strict=False)]
        for var, result in zip(eqn.outvars[carries:], results[carries:], strict=True):
            # Where the optimizer wants a gradient split, the partitioner stacks it split.
            own = self.parameters.get(tuple(var.aval.shape), ())
            made = self._make(var.aval, splits.merged([((), *result.split), own]) if own else ((), *result.split))
            if self.copies_gradients and any(own[2:]):
                self._copies.append((made.store, self._make(var.aval, made.split).store))
            if result.store.host:
                made.store.nbytes, made.store.host = 0, True
            outs.append(made)
        return outs

    def _carry(self, start: Value, split: Split) -> Value:
        """The room of a carried value: its start's own, unless that is an input or lies otherwise."""
        if start.store.region is not None and split == start.split:
            return start
        return self._make(Described(start.shape, start.itemsize), split)

    def _body(self, body: Any, given: list[Value], rounds: int) -> list[Value]:
        outer, self.region = self.region, Region(self.region.depth + 1)
        before, self._times = self._times, self._times * rounds
        try:
            results = self._walk(body.jaxpr, body.consts, given)
            self.region.time += 1
            for value in results:
                self._end(value)
            outer.inner.append((outer.time, self.region.held()))
        finally:
            self._times, self.region = before, outer
        return results

    @contextlib.contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """Only splits are learned; what is done does not count."""
        tally, region = self.tally, self.region
        self.tally, self.region = Tally(), Region(region.depth)
        try:
            yield
        finally:
            self.tally, self.region = tally, region

    def _while(self, eqn: Any, operands: list[Value]) -> list[Value]:
        self._read(*operands)
        self.tally.unknown_loops += 1
        skip = eqn.params["cond_nconsts"]
        fixed = operands[skip : skip + eqn.params["body_nconsts"]]
        carried = [self._carry(v, v.split) for v in operands[skip + len(fixed) :]]
        self._body(eqn.params["body_jaxpr"], [*fixed, *carried], 1)
        return [self._value(var.aval, v.split, v.store) for var, v in zip(eqn.outvars, carried, strict=True)]

    def _cond(self, eqn: Any, operands: list[Value]) -> list[Value]:
        """Every branch is walked; the one with the most products counts."""
        self._read(*operands)
        before, found = self.tally, []
        for branch in eqn.params["branches"]:
            self.tally = Tally()
            results = self._body(branch, operands[1:], 1)
            found.append((self.tally.flops, self.tally.moved, self.tally, results))
        *_, tally, results = max(found, key=lambda one: one[:2])
        before.kernels.update(tally.kernels)
        before.crossings.update(tally.crossings)
        before.opaque.update(tally.opaque)
        before.unknown_loops += tally.unknown_loops
        self.tally = before
        return [self._make(var.aval, v.split) for var, v in zip(eqn.outvars, results, strict=True)]

    def _shard_map(self, eqn: Any, operands: list[Value]) -> list[Value]:
        inner, local = eqn.params["jaxpr"], []
        for value, var, spec in zip(operands, inner.invars, eqn.params["in_specs"], strict=True):
            wanted = splits.effective(splits.from_spec(spec, len(value.shape)), self.sizes)
            there = self._laid_out(value, Described(value.shape, value.itemsize), wanted)
            local.append(self._value(var.aval, splits.whole(len(var.aval.shape)), there.store))
        self._local, was = True, self._local
        results = self._walk(inner, (), local)
        self._local = was
        outs = []
        for value, var, spec in zip(results, eqn.outvars, eqn.params["out_specs"], strict=True):
            split = splits.effective(splits.from_spec(spec, len(var.aval.shape)), self.sizes)
            outs.append(self._value(var.aval, split, value.store))
        return outs


@dataclasses.dataclass(frozen=True)
class Described:
    shape: tuple[int, ...]
    itemsize: int


_STRUCTURED = {
    "dot_general": "_product",
    "scan": "_scan",
    "while": "_while",
    "cond": "_cond",
    "shard_map": "_shard_map",
}


def _split_somewhere(values: Sequence[Value]) -> bool:
    return any(splits.axes_of(value.split) for value in values)


def _itemsize(aval: Any) -> int:
    if isinstance(aval, Described):
        return aval.itemsize
    return getattr(aval.dtype, "itemsize", 4)
