"""Public implementations of the same op, found by name and never copied: what imports, or a file of a checkout.

A peer takes the row's arguments, as arrays of its own framework, and gives the main result. One that is not installed,
or does not take a row, says why; nothing here is needed to install, train or test.
"""

import ast
import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlt.bench.rows import Row

Arrays = dict[str, Any]
Function = Callable[[Arrays], Any]


class Missing(Exception):
    """A peer that cannot be had here, and why."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """`make(row)` gives the function of the row's arguments, or raises `Missing`."""

    name: str
    framework: str  # jax or torch
    make: Callable[[Row], Function]


@dataclasses.dataclass(frozen=True)
class Ready:
    """A peer bound to one row: forward alone, forward with all gradients, on inputs given as NumPy arrays."""

    name: str
    forward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any]


def module(name: str) -> Any:
    """An installed module, or `Missing`."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # an import runs any code: whatever it raises, the peer is not here
        raise Missing(f"{name} does not import ({type(error).__name__}: {_line(error)})") from error


def source(package: str, path: str, checkouts: pathlib.Path | None = None) -> pathlib.Path:
    """A file of an installed package, found without importing it, or of `checkouts`/`package`."""
    if checkouts is not None and (checkouts / package / path).exists():
        return checkouts / package / path
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (found := pathlib.Path(folder).parent / path).exists():
            return found
    raise Missing(f"no {path}: {package} is not installed" + ("" if checkouts is None else " nor checked out"))


def functions(path: pathlib.Path, names: tuple[str, ...], scope: dict[str, Any]) -> dict[str, Any]:
    """Functions of a source file without its imports, which may need what is not here; `scope` stands for them."""
    tree = ast.parse(path.read_text())
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    if len(kept) != len(names):
        raise Missing(f"{path.name} has no {', '.join(sorted(set(names) - {node.name for node in kept}))}")
    scope = dict(scope)
    exec(compile(ast.Module(body=list(kept), type_ignores=[]), str(path), "exec"), scope)
    return scope


def ready(peer: Peer, row: Row, arrays: Arrays, cotangent: Any, *, device: str = "cpu") -> Ready:
    """Binds a peer to inputs and a cotangent, all NumPy arrays of 32 bits where the row has fewer."""
    function = peer.make(row)
    bind = _bind_torch if peer.framework == "torch" else _bind_jax
    return bind(peer.name, function, row, arrays, cotangent, device)


def _bind_jax(name: str, function: Function, row: Row, arrays: Arrays, cotangent: Any, device: str) -> Ready:
    del device
    wrt = row.wrt()
    described = row.described()
    inputs = {key: jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), arrays[key], described[key]) for key in arrays}
    fixed = {key: value for key, value in inputs.items() if key not in wrt}

    @jax.jit
    def both(diff: Arrays, fixed: Arrays, cotangent: Any) -> Any:
        out, pull = jax.vjp(lambda diff: function(fixed | diff), diff)
        return out, pull(cotangent.astype(out.dtype))[0]

    forward = jax.jit(lambda arrays: function(arrays))
    diff, cotangent = {key: inputs[key] for key in wrt}, jnp.asarray(cotangent)
    return Ready(name, lambda: forward(inputs), lambda: both(diff, fixed, cotangent), jax.block_until_ready)


def _bind_torch(name: str, function: Function, row: Row, arrays: Arrays, cotangent: Any, device: str) -> Ready:
    torch = module("torch")
    if device == "cpu":
        torch.set_num_threads(1)
    wrt, described = row.wrt(), row.described()

    def tensor(key: str, value: np.ndarray) -> Any:
        made = torch.from_numpy(np.array(value)).to(device)
        if described[key].dtype == jnp.bfloat16:
            made = made.to(torch.bfloat16)
        return made.requires_grad_(key in wrt)

    inputs = {key: tensor(key, value) for key, value in arrays.items()}
    ct = torch.from_numpy(np.array(cotangent)).to(device)

    def forward() -> Any:
        with torch.no_grad():
            return function(inputs)

    def both() -> Any:
        out = function(inputs)
        found = torch.autograd.grad(out, [inputs[key] for key in wrt], ct.to(out.dtype).reshape(out.shape), allow_unused=True)
        return out.detach(), dict(zip(wrt, found, strict=True))

    wait = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)
    return Ready(name, forward, both, wait)


def to_numpy(tree: Any) -> Any:
    """Arrays or tensors as NumPy arrays of at least 32 bits; a gradient that does not exist is None."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: to_numpy(value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(to_numpy(value) for value in tree)
    if hasattr(tree, "detach"):
        return tree.detach().float().cpu().numpy()
    array = np.asarray(tree)
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else ""
