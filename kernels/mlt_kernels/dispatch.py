"""Chooses the implementation of an op. The files of the op's folder are the table of its backends.

`mlt_kernels/<op>/` holds `__init__.py` (the public function), `reference.py` (the plain oracle), `cases.py`
(shared test and bench shapes) and one file per backend: `chunked.py` (portable XLA), `pallas_gpu.py`, and so on.
A backend file gives two functions that take the op's normalised keyword arguments:

    run(**arguments)          -> the op's result
    unsupported(**arguments)  -> None, or the reason why `run` cannot take these arguments on this platform

`unsupported` looks at shapes, dtypes and options only, so it also takes `jax.ShapeDtypeStruct`s.
"""

import contextlib
import contextvars
import difflib
import importlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax

PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "gpu": ("ragged_dot",),
    "tpu": ("ragged_dot",),
}
"""Hardware backends tried first on each platform; `chunked`, then `reference` always follow.

A backend that has not yet run and been timed on its hardware is not here: it is taken by name only.
"""

PORTABLE = ("chunked", "reference")

_ROOT = pathlib.Path(__file__).parent
_NOT_BACKENDS = {"__init__", "reference", "cases"}
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("mlt_kernels_platform", default=None)


class UnsupportedError(NotImplementedError):
    """No requested backend of an op can run the given arguments."""

    def __init__(self, op: str, reasons: Mapping[str, str]):
        self.op = op
        self.reasons = dict(reasons)
        lines = [f"{op}: backend {name!r} cannot run this call: {why}" for name, why in self.reasons.items()]
        super().__init__("\n".join(lines) + f"\nimplementation=None takes the best of {selectable(op)}")


def ops() -> tuple[str, ...]:
    """Names of the ops: the folders of the package that hold a public function."""
    found = (path.parent.name for path in _ROOT.glob("*/__init__.py"))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def backends(op: str) -> tuple[str, ...]:
    """Backend files present in the folder of `op`, without `reference`."""
    names = sorted(path.stem for path in (_ROOT / op).glob("*.py"))
    return tuple(name for name in names if name not in _NOT_BACKENDS and not name.startswith("_"))


def selectable(op: str) -> tuple[str, ...]:
    """Every name that `implementation=` takes: the backends, then `reference`."""
    return (*backends(op), "reference")


def platform() -> str:
    """The platform that calls are planned for: `cpu`, `gpu` or `tpu`."""
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def target_platform(name: str) -> Iterator[None]:
    """Plans (and traces) for another platform than the present one, e.g. to lower for `gpu` on a CPU host."""
    if name not in PREFERENCE:
        raise ValueError(f"target_platform: unknown platform {name!r}; known: {tuple(PREFERENCE)}")
    token = _platform.set(name)
    try:
        yield
    finally:
        _platform.reset(token)


def load(op: str, name: str) -> ModuleType:
    """The module of one implementation.

    Raises:
      ValueError: there is no such file; names the files present and the nearest of them.
    """
    if name not in selectable(op):
        near = difflib.get_close_matches(name, selectable(op), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{op}: no implementation {name!r}; present: {', '.join(selectable(op))}{hint}")
    return importlib.import_module(f"{__package__}.{op}.{name}")


def order(op: str, implementation: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Implementations to try, best first: the platform's order for None, else exactly what was asked for."""
    if implementation is None:
        present = selectable(op)
        return tuple(n for n in (*PREFERENCE.get(platform(), ()), *PORTABLE) if n in present)
    if isinstance(implementation, str):
        return (implementation,)
    names = tuple(implementation)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{op}: implementation must be None, a name or a list of names, got {implementation!r}")
    return names


def choose(op: str, implementation: str | Sequence[str] | None, arguments: Mapping[str, Any]) -> str:
    """Name of the first implementation in order that takes the normalised `arguments`.

    Raises:
      UnsupportedError: none of them does; lists the reason of each.
      ValueError: a name has no file.
    """
    reasons: dict[str, str] = {}
    names = order(op, implementation)
    modules = [load(op, name) for name in names]
    for name, module in zip(names, modules, strict=True):
        reason = module.unsupported(**arguments)
        if reason is None:
            return name
        reasons[name] = reason
    raise UnsupportedError(op, reasons)


def call(op: str, implementation: str | Sequence[str] | None, arguments: Mapping[str, Any]) -> Any:
    """Runs `op` on its validated, normalised keyword `arguments` with the chosen implementation."""
    return load(op, choose(op, implementation, arguments)).run(**arguments)


def plan(op: str, implementation: str | Sequence[str] | None = None, /, **arguments: Any) -> dict[str, str | None]:
    """What each implementation in order says of `arguments`: None if it can run, else its reason.

    Nothing runs. The first None is the one `call` takes.
    """
    return {name: load(op, name).unsupported(**arguments) for name in order(op, implementation)}
