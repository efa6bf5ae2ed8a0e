"""What goes through tokamax: ranges and gradients by its portable form, its GPU kernels lowered; skipped where it is absent."""

import functools
import importlib
import importlib.util
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch, testing, tokamax_calls
from mlt_kernels.attention import attention
from mlt_kernels.attention.cases import TESTS, Case, arguments
from mlt_kernels.grouped_matmul import grouped_matmul

RANGES = importlib.import_module("mlt_kernels.attention.tokamax")
PRODUCT = importlib.import_module("mlt_kernels.grouped_matmul.tokamax")
SERVED = {name: TESTS[name] for name in ("causal", "odd", "packed_window", "packed_all_keys")} | {
    "window of more keys": Case(T=17, S=40, H=8, options={"window": 9}),
    "more queries": Case(T=30, S=20, N=2),
    "all keys": Case(T=12, S=20, options={"causal": False, "softcap": 3.0}),
}
installed = pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="needs tokamax (Python 3.12)")


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


IDS = shape(2, 64, dtype=jnp.int32)


class H200:
    """As much of a device as tokamax asks for."""

    platform, device_kind, compute_capability, core_count = "gpu", "NVIDIA H200", "9.0", 132


@pytest.fixture
def as_xla(monkeypatch: pytest.MonkeyPatch):
    """tokamax's portable form, whose arguments are the same."""
    monkeypatch.setattr(tokamax_calls, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(RANGES, "unsupported", lambda **_: None)
    monkeypatch.setattr(PRODUCT, "unsupported", lambda **_: None)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """tokamax asks the default device what it is."""
    monkeypatch.setattr("jax.extend.backend.get_default_device", H200)


evaluate = functools.partial(testing.evaluate, attention)
oracle = functools.partial(testing.oracle, attention)


@installed
@pytest.mark.usefixtures("as_xla")
@pytest.mark.parametrize("name", SERVED)
def test_attention_is_told_the_same(name: str):
    given = arguments(SERVED[name])
    testing.assert_close(evaluate("tokamax", given), oracle(given), max_rel=1e-5, what=name)


@pytest.mark.parametrize("name", SERVED)
def test_ranges_are_the_visible_keys(name: str):
    """Without tokamax: the range of each query that sees anything, against the definition."""
    case = SERVED[name]
    given = arguments(case)
    segments = given.get("segment_ids")
    causal, window = given.get("causal", True), given.get("window")
    first, end, blind = RANGES._ranges(case.T, case.keys, causal, window, segments)
    t, s = np.arange(case.T)[:, None] + case.keys - case.T, np.arange(case.keys)[None]
    visible = np.ones((case.B, case.T, case.keys), bool)
    if segments is not None:
        ids = np.asarray(segments)
        visible &= (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, None]
    if causal:
        visible &= (s <= t) & (t - s < (window or case.keys + case.T))
    first = np.zeros((1, case.T), int) if first is None else np.asarray(first)
    end = np.full((1, case.T), case.keys) if end is None else np.asarray(end)
    assert (first < end).all(), "an empty range has no softmax"
    found = (s >= first[..., None]) & (s < end[..., None])
    if blind is not None:
        found = found & ~np.asarray(blind)[..., None]
    np.testing.assert_array_equal(np.broadcast_to(found, visible.shape), visible)


@installed
@pytest.mark.usefixtures("as_xla")
def test_documents_are_isolated_to_the_bit():
    given = arguments(Case(T=34, N=4, K=2, documents=9.0))
    fn = functools.partial(attention, window=5, implementation="tokamax")
    testing.check_isolation(fn, given, np.asarray(given["segment_ids"]), token_arguments=["q", "k", "v"])


@installed
@pytest.mark.usefixtures("as_xla")
def test_rows_of_no_group_are_zero_whatever_is_written_there(monkeypatch: pytest.MonkeyPatch):
    """The GPU kernel leaves them as they were: here NaN, in the result and in the gradient of lhs."""
    plain = tokamax_calls.ragged_dot

    @jax.custom_vjp
    def spoiled(lhs, rhs, sizes):
        return jnp.where((jnp.arange(lhs.shape[0]) < sizes.sum())[:, None], plain(lhs, rhs, sizes), jnp.nan)

    def backward(saved, d_out):
        lhs, rhs, sizes = saved
        d_lhs, d_rhs = jax.vjp(lambda lhs, rhs: plain(lhs, rhs, sizes), lhs, rhs)[1](d_out)
        return jnp.where((jnp.arange(lhs.shape[0]) < sizes.sum())[:, None], d_lhs, jnp.nan), d_rhs, None

    spoiled.defvjp(lambda *given: (spoiled(*given), given), backward)
    monkeypatch.setattr(tokamax_calls, "ragged_dot", spoiled)
    rng = np.random.default_rng(0)
    given = {
        name: jnp.asarray(rng.standard_normal(sizes), jnp.float32) for name, sizes in (("lhs", (21, 8)), ("rhs", (3, 8, 16)))
    }
    given["group_sizes"] = jnp.asarray([5, 0, 9], jnp.int32)
    found = testing.value_and_grads(functools.partial(grouped_matmul, implementation="tokamax"), given)
    wanted = testing.value_and_grads(functools.partial(grouped_matmul, implementation="reference"), given)
    testing.assert_close(found, wanted, max_rel=1e-5)


@installed
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("T", "S", "options"), [(256, 256, {}), (256, 256, {"causal": False}), (100, 100, {"window": 16}), (60, 256, {"window": 9})]
)
def test_attention_lowering(T: int, S: int, options: dict[str, Any]):
    q, k, v = shape(2, T, 4, 192), shape(2, S, 2, 192), shape(2, S, 2, 128)
    ids = shape(2, T, dtype=jnp.int32) if T == S else None

    def fn(q: Any, k: Any, v: Any, ids: Any) -> Any:
        op = functools.partial(attention, segment_ids=ids, implementation="tokamax", **options)
        return testing.value_and_grads(op, {"q": q, "k": k, "v": v})

    with dispatch.target_platform("gpu"):
        traced = jax.jit(fn).trace(q, k, v, ids)
        assert testing.largest_array_in(fn, q, k, v, ids) <= 2 * 256 * 4 * 192
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 3


@installed
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("M", "K", "N"), [(1000, 256, 192), (40, 8, 16)])
def test_product_lowering(M: int, K: int, N: int):
    def fn(lhs: Any, rhs: Any, sizes: Any) -> Any:
        op = functools.partial(grouped_matmul, group_sizes=sizes, implementation="tokamax")
        return testing.value_and_grads(op, {"lhs": lhs, "rhs": rhs})

    with dispatch.target_platform("gpu"):
        traced = jax.jit(fn).trace(shape(M, K), shape(5, K, N), shape(5, dtype=jnp.int32))
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 3


def described(**change: Any) -> dict[str, Any]:
    q, kv = shape(2, 64, 4, 64), shape(2, 64, 2, 64)
    nothing: dict[str, Any] = dict.fromkeys(("window", "segment_ids", "positions", "sinks", "softcap", "bias"))
    return {"q": q, "k": kv, "v": kv, "causal": True, "scale": 1.0, "return_lse": False, **nothing, **change}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"segment_ids": (IDS, IDS), "window": 7, "softcap": 2.0}, None),
        ({"segment_ids": (IDS, shape(2, 64, dtype=jnp.int32))}, "do not share a row"),
        ({"return_lse": True}, "no gradient"),
        ({"sinks": shape(4)}, "no sinks"),
        ({"bias": shape(1, 1, 64, 64)}, "a bias"),
        ({"positions": (IDS, None)}, "explicit positions"),
        (dict.fromkeys("qkv", shape(2, 64, 4, 64, dtype=jnp.float32)), "inputs of float32"),
        ({"v": shape(2, 64, 2, 512)}, "at most 256"),
    ],
)
def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str | None):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tokamax_calls, "refused", lambda *_: None)
    with dispatch.target_platform("gpu"):
        found = dispatch.plan("attention", "tokamax", **described(**change))["tokamax"]
    assert found is None if reason is None else found is not None and re.search(reason, found), found


def test_product_refusals_say_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tokamax_calls, "refused", lambda *_: None)

    def why(M: int, K: int, N: int) -> str | None:
        given = {"lhs": shape(M, K), "rhs": shape(5, K, N), "group_sizes": shape(5, dtype=jnp.int32)}
        return dispatch.plan("grouped_matmul", "tokamax", **given)["tokamax"]

    assert why(64, 64, 64) == "tokamax's kernels are for gpu; planned for cpu"
    with dispatch.target_platform("gpu"):
        assert why(1001, 128, 48) is None
        assert why(64, 200, 64) == "K=200, N=64; its kernels take multiples of 64, and of 8 below that"
        assert "nothing to compute" in why(0, 64, 64)


@installed
def test_the_gpu_present_decides():
    with dispatch.target_platform("gpu"), pytest.raises(dispatch.UnsupportedError, match="tokamax refuses it: Not supported on"):
        attention(*(jnp.ones((1, 8, 1, 64), jnp.bfloat16),) * 3, implementation="tokamax")


def test_a_missing_tokamax_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with dispatch.target_platform("gpu"):
        assert "tokamax not installed (pip install tokamax" in dispatch.plan("attention", "tokamax", **described())["tokamax"]


def test_backends_import_without_tokamax():
    """In a process where any import of tokamax fails."""
    code = """
import sys
sys.modules["tokamax"] = None
from mlt_kernels import dispatch
for op in ("attention", "grouped_matmul"):
    dispatch.load(op, "tokamax")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(("op", "backend"), [("attention", "cudnn"), ("attention", "tokamax"), ("grouped_matmul", "tokamax")])
def test_never_a_default(op: str, backend: str):
    """Until it has run on a GPU."""
    assert backend in dispatch.backends(op)
    assert backend not in dispatch.PREFERENCE["gpu"]
