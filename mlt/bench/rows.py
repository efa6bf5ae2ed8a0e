"""What is timed: an op at a published shape, how its inputs are drawn, and what it must cost.

Inputs are drawn on the device and never zero: zeros run faster. Which rows there are is in `suites.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mlt_kernels
import numpy as np
from jax import Array

from mlt.bench import floor
from mlt.bench.floor import Cost

SHARES = (0.03, 0.27, 0.09, 0.19, 0.02, 0.23, 0.06, 0.11)
"""Lengths of the documents of a packed row, as shares of it."""

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table. `kind` names the recurrence or layer, by which peers are found."""

    name: str
    op: str
    kind: str
    sizes: dict[str, int]
    draw: Callable[[Array], Arrays]  # key -> arguments
    call: Callable[..., Array]  # (arguments, implementation=) -> the main result
    cost: tuple[Cost, Cost] | None  # FLOPs and exponentials, forward and backward; None if unknown
    small: "Callable[[], Row]"  # the same kind at a size that float64 token loops can hold
    bytes_too: bool = False  # the cost has the bytes as well, in place of every array once
    documents: tuple[int, ...] | None = None
    dtype: Any = jnp.float32

    def described(self) -> Arrays:
        """Shapes and types of the arguments; nothing is drawn."""
        return jax.eval_shape(self.draw, jax.random.key(0))

    def wrt(self) -> tuple[str, ...]:
        """Arguments that have a gradient."""
        return differentiable(self.described())

    def costs(self) -> tuple[Cost, Cost]:
        """Forward and backward."""
        arrays = self.described()
        if self.cost is not None and self.bytes_too:
            return self.cost
        result = jax.eval_shape(lambda arrays: self.call(arrays, implementation="reference"), arrays)
        moved = floor.traffic(arrays, result, self.wrt())
        known = self.cost or (Cost(), Cost())
        return known[0] + moved[0], known[1] + moved[1]


def differentiable(arrays: Arrays) -> tuple[str, ...]:
    """Names whose leaves are all floating or complex."""

    def inexact(value: Any) -> bool:
        leaves = jax.tree.leaves(value)
        return bool(leaves) and all(hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves)

    return tuple(name for name, value in arrays.items() if inexact(value))


def packed(T: int) -> tuple[int, ...]:
    """Eight documents of unequal length that fill T tokens."""
    lengths = [max(1, int(share * T)) for share in SHARES]
    return (*lengths[:-1], T - sum(lengths[:-1]))


def _ids(documents: tuple[int, ...] | None, B: int) -> Array | None:
    if documents is None:
        return None
    ids = np.repeat(np.arange(1, len(documents) + 1), documents).astype(np.int32)
    return jnp.broadcast_to(jnp.asarray(ids), (B, len(ids)))


def recurrence(
    name: str,
    kind: str,
    *,
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    Hk: int | None = None,
    C: int = 64,
    pack: bool = False,
    dtype: Any,
) -> Row:
    """A row of `linear_recurrence`; `kind` is ssd, simple_gla, gla, gated_delta, kda or mlstm."""
    Hk = H if Hk is None else Hk
    rule = "delta" if kind in ("gated_delta", "kda") else "add"
    gate = "vector" if kind in ("gla", "kda") else "scalar"
    documents = packed(T) if pack else None
    fixed: dict[str, Any] = {"rule": rule, "chunk_size": C} | ({"normalizer": "mlstm"} if kind == "mlstm" else {})

    def draw(key: Array) -> Arrays:
        q, k, v, g, b, i = jax.random.split(key, 6)
        keys = jax.random.normal(k, (B, T, Hk, K))
        made = {
            "q": jax.random.normal(q, (B, T, Hk, K), dtype),
            "k": (keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)).astype(dtype),
            "v": jax.random.normal(v, (B, T, H, V), dtype),
            "log_decay": -jnp.exp(jax.random.normal(g, (B, T, H, K) if gate == "vector" else (B, T, H)) - 2),
        }
        if rule == "delta":
            made["beta"] = jax.nn.sigmoid(jax.random.normal(b, (B, T, H)))
        if kind == "mlstm":
            made["log_input"] = jax.random.normal(i, (B, T, H))
        return made | ({"segment_ids": _ids(documents, B)} if documents else {})

    def call(arrays: Arrays, *, implementation: Any = None) -> Array:
        return mlt_kernels.linear_recurrence(**arrays, **fixed, implementation=implementation)

    cost = floor.linear_recurrence(tokens=B * T, heads=H, key_heads=Hk, K=K, V=V, C=C, rule=rule, gate=gate)
    sizes = {"B": B, "T": T, "H": H, "Hk": Hk, "K": K, "V": V, "C": C}

    def small() -> Row:
        return recurrence(name, kind, B=1, T=min(T, 512), H=H, Hk=Hk, K=K, V=V, C=C, pack=pack, dtype=dtype)

    return Row(name, "linear_recurrence", kind, sizes, draw, call, cost, small, documents=documents, dtype=dtype)


def attention(name: str, *, B: int, T: int, N: int, H: int, K: int | None = None, pack: bool = False, dtype: Any) -> Row:
    """A row of causal `attention`."""
    K = N if K is None else K
    documents = packed(T) if pack else None

    def draw(key: Array) -> Arrays:
        q, k, v = jax.random.split(key, 3)
        made = {
            "q": jax.random.normal(q, (B, T, N, H), dtype),
            "k": jax.random.normal(k, (B, T, K, H), dtype),
            "v": jax.random.normal(v, (B, T, K, H), dtype),
        }
        return made | ({"segment_ids": _ids(documents, B)} if documents else {})

    def call(arrays: Arrays, *, implementation: Any = None) -> Array:
        return mlt_kernels.attention(**arrays, implementation=implementation)

    pairs = B * sum(n * n / 2 for n in documents or (T,))
    cost = floor.attention(pairs=pairs, heads=N, H=H, P=H)
    sizes = {"B": B, "T": T, "N": N, "K": K, "H": H}

    def small() -> Row:
        return attention(name, B=1, T=min(T, 512), N=N, H=H, K=K, pack=pack, dtype=dtype)

    return Row(name, "attention", "attention", sizes, draw, call, cost, small, documents=documents, dtype=dtype)


def diagonal(name: str, *, B: int, T: int, E: int, dtype: Any, pack: bool = False) -> Row:
    """A row of `diagonal_recurrence` as RG-LRU uses it."""
    documents = packed(T) if pack else None

    def draw(key: Array) -> Arrays:
        a, b = jax.random.split(key)
        made = {
            "a": jax.nn.sigmoid(jax.random.normal(a, (B, T, E)) + 3).astype(dtype),
            "b": jax.random.normal(b, (B, T, E), dtype),
        }
        return made | ({"segment_ids": _ids(documents, B)} if documents else {})

    def call(arrays: Arrays, *, implementation: Any = None) -> Array:
        return mlt_kernels.diagonal_recurrence(**arrays, implementation=implementation)

    def small() -> Row:
        return diagonal(name, B=1, T=min(T, 512), E=E, dtype=dtype, pack=pack)

    sizes, cost = {"B": B, "T": T, "E": E}, (Cost(), Cost())
    return Row(name, "diagonal_recurrence", "rg_lru", sizes, draw, call, cost, small, documents=documents, dtype=dtype)


def selective(name: str, *, B: int, T: int, E: int, N: int, dtype: Any, pack: bool = False) -> Row:
    """A row of `selective_scan` as Mamba-1 uses it."""
    documents = packed(T) if pack else None

    def draw(key: Array) -> Arrays:
        x, step, b, c = jax.random.split(key, 4)
        made = {
            "x": jax.random.normal(x, (B, T, E), dtype),
            "step": jax.nn.softplus(jax.random.normal(step, (B, T, E)) - 3).astype(dtype),
            "A": -jnp.broadcast_to(jnp.arange(1.0, N + 1), (E, N)),
            "B": jax.random.normal(b, (B, T, N), dtype),
            "C": jax.random.normal(c, (B, T, N), dtype),
            "skip": jnp.ones((E,), jnp.float32),
        }
        return made | ({"segment_ids": _ids(documents, B)} if documents else {})

    def call(arrays: Arrays, *, implementation: Any = None) -> Array:
        return mlt_kernels.selective_scan(**arrays, implementation=implementation)

    def small() -> Row:
        return selective(name, B=1, T=min(T, 256), E=min(E, 512), N=N, dtype=dtype, pack=pack)

    sizes, cost = {"B": B, "T": T, "E": E, "N": N}, floor.selective_scan(tokens=B * T, E=E, N=N)
    return Row(name, "selective_scan", "mamba1", sizes, draw, call, cost, small, documents=documents, dtype=dtype)


def convolution(name: str, *, B: int, T: int, D: int, W: int = 4, dtype: Any) -> Row:
    """A row of `causal_conv` with SiLU."""

    def draw(key: Array) -> Arrays:
        x, w = jax.random.split(key)
        return {"x": jax.random.normal(x, (B, T, D), dtype), "kernel": jax.random.normal(w, (W, D), dtype)}

    def call(arrays: Arrays, *, implementation: Any = None) -> Array:
        return mlt_kernels.causal_conv(**arrays, activation="silu", implementation=implementation)

    def small() -> Row:
        return convolution(name, B=1, T=min(T, 512), D=D, W=W, dtype=dtype)

    sizes, cost = {"B": B, "T": T, "D": D, "W": W}, (Cost(), Cost())
    return Row(name, "causal_conv", "causal_conv", sizes, draw, call, cost, small, dtype=dtype)


def experts(name: str, *, T: int, E: int, top: int, D: int, F: int, dtype: Any) -> Row:
    """Gated experts on rows already sorted: `grouped_swiglu`, on the backends of `grouped_matmul`."""
    shares = np.linspace(0.5, 1.5, E) / E
    sizes = np.floor(shares * T * top).astype(np.int32)
    sizes[-1] += T * top - sizes.sum()

    def draw(key: Array) -> Arrays:
        x, gate, up, down = jax.random.split(key, 4)
        return {
            "x": jax.random.normal(x, (T * top, D), dtype),
            "gate": (jax.random.normal(gate, (E, D, F)) * D**-0.5).astype(dtype),
            "up": (jax.random.normal(up, (E, D, F)) * D**-0.5).astype(dtype),
            "down": (jax.random.normal(down, (E, F, D)) * F**-0.5).astype(dtype),
            "group_sizes": jnp.asarray(sizes),
        }

    def call(arrays: Arrays, *, implementation: Any = None) -> Array:
        return mlt_kernels.grouped_swiglu(**arrays, implementation=implementation)

    def small() -> Row:
        return experts(name, T=min(T, 256), E=min(E, 8), top=top, D=D, F=F, dtype=dtype)

    facts = {"T": T, "E": E, "top": top, "D": D, "F": F}
    return Row(name, "grouped_matmul", "moe", facts, draw, call, floor.gated_experts(rows=T * top, D=D, F=F), small, dtype=dtype)


def loss(name: str, *, T: int, D: int, V: int, dtype: Any) -> Row:
    """A row of `cross_entropy`: the sum of the losses, which is what is differentiated."""

    def draw(key: Array) -> Arrays:
        h, w, y = jax.random.split(key, 3)
        return {
            "hidden": jax.random.normal(h, (1, T, D), dtype),
            "unembedding": (jax.random.normal(w, (D, V)) * 2 * D**-0.5).astype(dtype),
            "labels": jax.random.randint(y, (1, T), 0, V),
        }

    def call(arrays: Arrays, *, implementation: Any = None) -> Array:
        return mlt_kernels.cross_entropy(**arrays, implementation=implementation).sum()

    def small() -> Row:
        return loss(name, T=min(T, 256), D=D, V=min(V, 16384), dtype=dtype)

    cost = floor.cross_entropy(tokens=T, D=D, V=V)
    return Row(name, "cross_entropy", "cross_entropy", {"T": T, "D": D, "V": V}, draw, call, cost, small, dtype=dtype)


def lookup(name: str, *, T: int, k: int, M: int, D: int, pooled: bool, dtype: Any) -> Row:
    """A row of `row_lookup`: product-key memory if pooled, an n-gram table if not."""

    def draw(key: Array) -> Arrays:
        t, i, w = jax.random.split(key, 3)
        made = {"table": jax.random.normal(t, (M, D), dtype), "indices": jax.random.randint(i, (1, T, k), 0, M)}
        return made | ({"weights": jax.nn.softmax(jax.random.normal(w, (1, T, k))).astype(dtype)} if pooled else {})

    def call(arrays: Arrays, *, implementation: Any = None) -> Array:
        return mlt_kernels.row_lookup(**arrays, implementation=implementation)

    item = jnp.dtype(dtype).itemsize
    cost = floor.row_lookup(rows=T * k, D=D, out=T if pooled else T * k, item=item, pooled=pooled)
    kind, sizes = "pkm" if pooled else "engram", {"T": T, "k": k, "M": M, "D": D}

    def small() -> Row:
        return lookup(name, T=min(T, 256), k=k, M=min(M, 2**14), D=D, pooled=pooled, dtype=dtype)

    return Row(name, "row_lookup", kind, sizes, draw, call, cost, small, bytes_too=True, dtype=dtype)


def products(name: str, *, T: int, k: int, M: int, D: int, dtype: Any) -> Row:
    """A row of `row_dot`: experts of one neuron."""

    def draw(key: Array) -> Arrays:
        t, i, x = jax.random.split(key, 3)
        indices = jax.random.randint(i, (1, T, k), 0, M)
        return {"table": jax.random.normal(t, (M, D), dtype), "indices": indices, "x": jax.random.normal(x, (1, T, D), dtype)}

    def call(arrays: Arrays, *, implementation: Any = None) -> Array:
        return mlt_kernels.row_dot(**arrays, implementation=implementation)

    def small() -> Row:
        return products(name, T=min(T, 256), k=k, M=min(M, 2**14), D=D, dtype=dtype)

    # The bytes and products are those of pooling as many rows, the other way round.
    cost = floor.row_lookup(rows=T * k, D=D, out=T, item=jnp.dtype(dtype).itemsize, pooled=True)
    sizes = {"T": T, "k": k, "M": M, "D": D}
    return Row(name, "row_dot", "products", sizes, draw, call, cost, small, bytes_too=True, dtype=dtype)
