"""Which rows are timed: shapes for one CPU core, and those of published models for a GPU.

An op without rows here brings the BENCHES of its `cases.py`: those named `cpu...` to the CPU, the others to a GPU.
"""

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from mlt_kernels import dispatch

from mlt.bench.rows import (
    Arrays,
    Row,
    attention,
    convolution,
    diagonal,
    experts,
    lookup,
    loss,
    products,
    recurrence,
    selective,
)

SUITES = ("cpu", "small", "std", "long")


def rows(suite: str) -> list[Row]:
    """Every row of a suite, ops in order of their names."""
    made = _cpu() if suite == "cpu" else _accelerator(suite)
    have = {row.op for row in made}
    for op in dispatch.ops():
        if op not in have and importlib.util.find_spec(f"mlt_kernels.{op}.cases"):
            made += _from_cases(op, suite)
    return sorted(made, key=lambda row: row.op)


def _cpu() -> list[Row]:
    f32 = jnp.float32
    delta: dict[str, Any] = {"B": 1, "H": 4, "K": 64, "V": 64, "dtype": f32}
    add: dict[str, Any] = {"B": 1, "H": 8, "K": 64, "V": 64, "dtype": f32}
    return [
        recurrence("SSD B1 T2048 H8 P64 N64", "ssd", T=2048, **add),
        recurrence("SSD B1 T8192 H8 P64 N64", "ssd", T=8192, **add),
        recurrence("SSD B1 T2048 H8 packed", "ssd", T=2048, pack=True, **add),
        recurrence("vector decay B1 T2048 H8 D64", "gla", T=2048, **add),
        recurrence("gated delta B1 T2048 H4 D64", "gated_delta", T=2048, **delta),
        recurrence("gated delta B1 T2048 H4 packed", "gated_delta", T=2048, pack=True, **delta),
        recurrence("KDA B1 T2048 H4 D64", "kda", T=2048, **delta),
        recurrence("mLSTM B1 T2048 H4 K64 V128", "mlstm", B=1, T=2048, H=4, K=64, V=128, dtype=f32),
        diagonal("RG-LRU B1 T2048 E512", B=1, T=2048, E=512, dtype=f32),
        selective("Mamba-1 B1 T1024 E256 N16", B=1, T=1024, E=256, N=16, dtype=f32),
        attention("attention B4 T1024 N4 H64", B=4, T=1024, N=4, H=64, dtype=f32),
        attention("attention B4 T1024 N4 packed", B=4, T=1024, N=4, H=64, pack=True, dtype=f32),
        convolution("convolution B1 T2048 D512 W4", B=1, T=2048, D=512, dtype=f32),
        experts("experts T4096 E16 K2 D256 F512", T=4096, E=16, top=2, D=256, F=512, dtype=f32),
        loss("cross-entropy T2048 D256 V32768", T=2048, D=256, V=32768, dtype=f32),
        lookup("PKM T2048 4x32 of 65536 x 256", T=2048, k=128, M=65536, D=256, pooled=True, dtype=f32),
        lookup("Engram T4096 16 of 65536 x 80", T=4096, k=16, M=65536, D=80, pooled=False, dtype=f32),
        products("PEER T2048 8x16 of 65536 x 256", T=2048, k=128, M=65536, D=256, dtype=f32),
    ]


def _accelerator(suite: str) -> list[Row]:
    """Shapes of published models, all bfloat16: B8 at 1k or 4k tokens, B1 at 32k or 128k."""
    made: list[Row] = []
    for B, T in {"small": [(8, 1024)], "std": [(8, 4096), (1, 32768)], "long": [(1, 131072)]}[suite]:
        made += _mixers(B, T) + (_more_mixers(B, T) if B > 1 else [])
    if suite == "long":
        return [*made, diagonal("RG-LRU B1 T128k E4096", B=1, T=131072, E=4096, dtype=jnp.bfloat16)]
    return made + _by_tokens(1024 if suite == "small" else None)


def _mixers(B: int, T: int) -> list[Row]:
    d: dict[str, Any] = {"dtype": jnp.bfloat16}
    short_T = 2048 if T == 4096 else T
    size, short = f"B{B} T{_short(T)}", f"B{B} T{_short(short_T)}"
    wide: dict[str, Any] = {"B": B, "T": T, "H": 32, "K": 128, "V": 128, **d}
    delta: dict[str, Any] = wide | {"H": 32 if B > 1 else 16}
    return [
        recurrence(f"SSD {short} H64 P64 N128", "ssd", B=B, T=short_T, H=64, Hk=1, K=128, V=64, C=256, **d),
        recurrence(f"scalar decay {size} H32 D128", "simple_gla", **wide),
        recurrence(f"gated delta {size} H{delta['H']} D128", "gated_delta", **delta),
        recurrence(f"KDA {size} H{delta['H']} D128", "kda", **delta),
        attention(f"attention {short} N32 H128", B=B, T=short_T, N=32, H=128, **d),
    ]


def _more_mixers(B: int, T: int) -> list[Row]:
    d: dict[str, Any] = {"dtype": jnp.bfloat16}
    short_T = 2048 if T == 4096 else T
    size, short = f"B{B} T{_short(T)}", f"B{B} T{_short(short_T)}"
    wide: dict[str, Any] = {"B": B, "T": T, "H": 32, "K": 128, "V": 128, **d}
    heads: dict[str, Any] = {"B": B, "T": short_T, "N": 32, "H": 128, **d}
    return [
        recurrence(f"vector decay {size} H32 D128", "gla", **wide),
        recurrence(f"mLSTM {size} H8 K256 V512", "mlstm", B=B, T=T, H=8, K=256, V=512, C=128, **d),
        recurrence(f"gated delta {size} 16 key 32 value heads", "gated_delta", **wide, Hk=16),
        recurrence(f"gated delta {size} packed", "gated_delta", pack=True, **wide),
        recurrence(f"SSD {short} packed", "ssd", B=B, T=short_T, H=64, Hk=1, K=128, V=64, C=256, pack=True, **d),
        attention(f"attention {short} packed", pack=True, **heads),
        attention(f"attention {short} 8 key 32 query heads", K=8, **heads),
        convolution(f"convolution {size} D4096 W4", B=B, T=T, D=4096, **d),
        selective(f"Mamba-1 {short} E4096 N16", B=B, T=short_T, E=4096, N=16, **d),
        diagonal(f"RG-LRU {size} E4096", B=B, T=T, E=4096, **d),
    ]


def _by_tokens(tokens: int | None) -> list[Row]:
    """Channel mixers and the loss; `tokens` in place of their own number."""
    d: dict[str, Any] = {"dtype": jnp.bfloat16}
    moe, ce, pkm, engram = (tokens or T for T in (32768, 8192, 16384, 65536))
    return [
        experts(f"experts T{_short(moe)} E64 K2 D2048 F1408", T=moe, E=64, top=2, D=2048, F=1408, **d),
        loss(f"cross-entropy T{_short(ce)} D2048 V131072", T=ce, D=2048, V=131072, **d),
        lookup(f"PKM T{_short(pkm)} 4x32 of 2^20 x 1024", T=pkm, k=128, M=2**20, D=1024, pooled=True, **d),
        products(f"PEER T{_short(pkm)} 8x16 of 2^20 x 1024", T=pkm, k=128, M=2**20, D=1024, **d),
        lookup(f"Engram T{_short(engram)} 2x8 of 2^20 x 80", T=engram, k=16, M=2**20, D=80, pooled=False, **d),
    ]


def _short(T: int) -> str:
    return f"{T // 1024}k" if T % 1024 == 0 else str(T)


def _from_cases(op: str, suite: str) -> list[Row]:
    """Rows of an op that has none above: its BENCHES, without a model of its cost beyond the bytes."""
    if suite == "long":
        return []
    module = importlib.import_module(f"mlt_kernels.{op}.cases")
    on_cpu = suite == "cpu"
    chosen = {name: case for name, case in module.BENCHES.items() if name.startswith("cpu") == on_cpu}
    return [_from_case(op, name, case, jnp.float32 if on_cpu else jnp.bfloat16, suite) for name, case in chosen.items()]


def _from_case(op: str, name: str, case: Any, dtype: Any, suite: str) -> Row:
    module = importlib.import_module(f"mlt_kernels.{op}.cases")
    public = getattr(importlib.import_module(f"mlt_kernels.{op}"), op)
    if suite == "small":
        case = reduced(case)

    def split(case: Any) -> tuple[Arrays, dict[str, Any]]:
        made = module.arguments(case, dtype=dtype)
        arrays = {
            name: x for name, x in made.items() if jax.tree.leaves(x) and all(hasattr(y, "dtype") for y in jax.tree.leaves(x))
        }
        return arrays, {name: x for name, x in made.items() if name not in arrays}

    fixed = split(reduced(case, tokens=64))[1]

    def draw(key: Array) -> Arrays:
        del key  # the case draws its own numbers
        return split(case)[0]

    def call(arrays: Arrays, *, implementation: Any = None) -> Array:
        result = public(**arrays, **fixed, implementation=implementation)
        return result[0] if isinstance(result, tuple) else result

    sizes = {f.name: getattr(case, f.name) for f in dataclasses.fields(case) if isinstance(getattr(case, f.name), int)}

    def small() -> Row:
        return _from_case(op, name, reduced(case), dtype, suite)

    return Row(f"{op} {name}", op, op, sizes, draw, call, None, small, dtype=dtype)


def reduced(case: Any, *, tokens: int = 512) -> Any:
    """A case of one row and few tokens, all else equal."""
    limits = {"B": 1, "T": tokens}
    present = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    return dataclasses.replace(
        case, **{n: min(present[n], limit) for n, limit in limits.items() if isinstance(present.get(n), int)}
    )
