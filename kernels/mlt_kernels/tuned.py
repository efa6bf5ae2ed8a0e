"""Block sizes of the GPU kernels: what was measured on a card, from its table, else the kernel's own rule.

A kernel asks once for each launch, while it is traced:

    slab, warps, stages = tuned.sizes("linear_recurrence", "triton_gpu", "forward", shape, {"slab": 64, "warps": 8, "stages": 3})

`shape` is what its registers and shared memory depend on; the dict is the rule's choice, good on every card, and has the names
that a table may replace (`KERNELS`). A table is `tuned_tables/<device>.json`, written by `python tools/tune_gpu.py`, read once a
process and checked whole: a wrong one is an error, never a silent default. The device is that of `pallas.device_kind()`, so
programs lowered for a card that is not there get that card's sizes; on a host that knows of none, the rules hold.
"""

import contextlib
import contextvars
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mlt_kernels import pallas

FOLDER = pathlib.Path(__file__).parent / "tuned_tables"
MOST_WARPS, MOST_STAGES = 16, 8
Sizes = dict[str, int]
Shape = Mapping[str, int | str | bool]


class Key(NamedTuple):
    """A kernel and what its sizes depend on."""

    op: str
    backend: str
    kernel: str
    shape: tuple[tuple[str, int | str | bool], ...]  # sorted by name


class Kernel(NamedTuple):
    """Names of a kernel's shape; names of its sizes with the name in the shape that each must divide, "" for none.

    The dim counts rounded up to a power of two of 16 at least, as tiles do.
    """

    shape: tuple[str, ...]
    sizes: dict[str, str]


def _linear(**sizes: str) -> Kernel:
    return Kernel(("K", "V", "item_bytes", "vector"), sizes | {"warps": "", "stages": ""})


def _free(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "")


KERNELS: dict[tuple[str, str], dict[str, Kernel]] = {
    ("linear_recurrence", "pallas_gpu"): {
        **dict.fromkeys(("forward", "values"), _linear(slab="V")),
        **dict.fromkeys(("queries", "keys"), _linear(slab="K")),
        **dict.fromkeys(("pairs", "inner"), _linear()),
        "delta": Kernel(
            ("K", "decay", "item_bytes"),
            _free("value_block", "sweep_warps", "solve_warps", "tile_warps", "sweep_stages", "tile_stages"),
        ),
    },
    ("linear_recurrence", "triton_gpu"): {
        **dict.fromkeys(("forward", "values", "delta_run", "delta_reverse", "kda_run", "kda_reverse"), _linear(values="V")),
        **dict.fromkeys(("queries", "keys", "sums", "prepare", "inner", "delta_solve", "kda_prepare"), _linear(keys="K")),
        **dict.fromkeys(("delta_pairs", "delta_keys", "kda_pairs", "kda_keys"), _linear(keys="K", values="V")),
        "delta_invert": _linear(),
    },
    ("causal_conv", "pallas_gpu"): {"walk": Kernel(("item_bytes", "taps"), _free("tokens", "channels"))},
    ("causal_conv", "triton_gpu"): {
        "forward": Kernel(("context", "item_bytes", "taps"), _free("tokens", "channels", "warps")),
        "backward": Kernel(("context", "item_bytes", "taps"), _free("channels", "warps")),
    },
    ("diagonal_recurrence", "pallas_gpu"): {"walk": Kernel(("item_bytes",), _free("channels"))},
    ("diagonal_recurrence", "triton_gpu"): {
        "walk": Kernel(("complex", "item_bytes"), _free("tokens", "channels", "warps", "stages")),
    },
    **{
        ("selective_scan", backend): dict.fromkeys(("forward", "backward"), Kernel(("states",), _free("channels")))
        for backend in ("pallas_gpu", "triton_gpu")
    },
}
"""Every kernel that asks. Chunk lengths are not here: all kernels of a call share one, and it changes rounding."""


def sizes(op: str, backend: str, kernel: str, shape: Shape, rule: Sizes, *, device: str | None = None) -> Sizes:
    """The sizes of a kernel at a shape, in the order of `rule`, which holds where the device's table has no line.

    Raises:
      ValueError: the device's table is wrong.
    """
    known = KERNELS[op, backend][kernel]
    if rule.keys() != known.sizes.keys() or set(shape) != set(known.shape):
        raise KeyError(f"{op}, {backend}, {kernel} asks by {sorted(shape)} for {sorted(rule)}; tuned.KERNELS has {known}")
    key = Key(op, backend, kernel, tuple(sorted(shape.items())))
    asked, tried = _asked.get(), _tried.get()
    if asked is not None:
        asked[key] = dict(rule)
    if tried is not None:
        return rule | tried.get(key, {})
    return rule | table(pallas.device_kind() if device is None else device).get(key, {})


_asked: contextvars.ContextVar[dict[Key, Sizes] | None] = contextvars.ContextVar("mlt_kernels_tuned_asked", default=None)
_tried: contextvars.ContextVar[Mapping[Key, Sizes] | None] = contextvars.ContextVar("mlt_kernels_tuned_tried", default=None)


@contextlib.contextmanager
def asked() -> Iterator[dict[Key, Sizes]]:
    """What kernels traced inside ask for, with the choice of their rules."""
    found: dict[Key, Sizes] = {}
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


@contextlib.contextmanager
def trying(candidate: Mapping[Key, Sizes]) -> Iterator[None]:
    """Kernels traced inside get these sizes, others their rule's; no table counts. A function jitted before keeps its own."""
    token = _tried.set(candidate)
    try:
        yield
    finally:
        _tried.reset(token)


def file_of(device: str) -> pathlib.Path:
    """Where the table of a device is, or would be."""
    return FOLDER / (device.lower().replace(" ", "-") + ".json")


def table(device: str) -> dict[Key, Sizes]:
    """The sizes measured on a device; none where it has no table."""
    return _load(file_of(device)) if device else {}


@functools.cache
def _load(path: pathlib.Path) -> dict[Key, Sizes]:
    if not path.exists():
        return {}
    found = load(path)
    device = json.loads(path.read_text()).get("device", "")
    if file_of(device) != path:
        raise ValueError(f"{path}: is of device {device!r}, whose table is {file_of(device).name}")
    return found


def load(path: pathlib.Path) -> dict[Key, Sizes]:
    """Reads and checks a table.

    Raises:
      ValueError: it is no JSON, names a kernel, shape or size that there is not, or a size that cannot be; with the file's name.
    """
    try:
        lines = json.loads(path.read_text())["kernels"]
        return dict(checked(line) for line in lines)
    except KeyError as error:
        raise ValueError(f"{path}: has no {error.args[0]!r}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def checked(line: Any) -> tuple[Key, Sizes]:
    """One line of a table: {"op", "backend", "kernel", "shape": {..}, "sizes": {..}}; what else it has says where that is from.

    Raises:
      ValueError, KeyError: as `load`, without the file.
    """
    op, backend, kernel, shape, found = (line[name] for name in ("op", "backend", "kernel", "shape", "sizes"))
    where = f"{op}, {backend}, {kernel}"
    known = KERNELS.get((op, backend), {}).get(kernel)
    if known is None:
        there = ", ".join(f"{'/'.join(pair)}: {' '.join(names)}" for pair, names in KERNELS.items())
        raise ValueError(f"{where}: no such kernel; there are {there}")
    if set(shape) != set(known.shape) or set(found) != set(known.sizes):
        raise ValueError(f"{where}: shape {shape}, sizes {found}; expected the names {known.shape} and {tuple(known.sizes)}")
    for name, size in found.items():
        problem = refused(known, name, size, shape)
        if problem:
            raise ValueError(f"{where}: {name}={size!r} {problem}")
    return Key(op, backend, kernel, tuple(sorted(shape.items()))), found


def refused(known: Kernel, name: str, size: Any, shape: Shape) -> str | None:
    """Why a kernel cannot have a size, or None."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        return "is no positive integer"
    if name.endswith("stages"):
        return None if size <= MOST_STAGES else f"is more than {MOST_STAGES}"
    if size & (size - 1):
        return "is no power of two"
    if name.endswith("warps"):
        return None if size <= MOST_WARPS else f"is more than {MOST_WARPS}"
    dim = known.sizes[name]
    if size < (least := 16 if dim else 8):
        return f"is less than {least}"
    if dim and size > (whole := max(16, 1 << (int(shape[dim]) - 1).bit_length())):
        return f"does not divide {dim}={shape[dim]}, a tile of {whole}"
    return None
