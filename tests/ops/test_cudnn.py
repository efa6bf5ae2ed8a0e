"""`attention` by cuDNN: masks and gradients through JAX's own portable form of the same call, the call lowered for cuda."""

import functools
import importlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch, testing
from mlt_kernels.attention import attention
from mlt_kernels.attention.cases import Case, arguments

CUDNN = importlib.import_module("mlt_kernels.attention.cudnn")
SERVED = {
    "grouped heads": Case(T=20, H=8, options={"scale": 0.7}),
    "other documents' keys": Case(B=1, T=12, S=28, N=2, documents=None, options={"causal": False}),
    "packed window": Case(T=34, N=4, K=2, documents=9.0, options={"window": 5}),
    "packed, all keys, bias": Case(T=20, N=2, documents=6.0, bias=(False, True, True, True), options={"causal": False}),
    "bias of keys": Case(T=16, N=2, bias=(True, False, False, True)),
}


@pytest.fixture
def as_xla(monkeypatch: pytest.MonkeyPatch):
    """JAX's portable form, whose arguments are the same; cuDNN runs on a GPU alone."""
    monkeypatch.setattr(CUDNN, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(CUDNN, "unsupported", lambda **_: None)


@pytest.fixture
def cudnn_version(monkeypatch: pytest.MonkeyPatch):
    """JAX traces for cuDNN where it finds none."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


evaluate = functools.partial(testing.evaluate, attention)
oracle = functools.partial(testing.oracle, attention)


@pytest.mark.usefixtures("as_xla")
@pytest.mark.parametrize("name", SERVED)
def test_cudnn_is_told_the_same_attention(name: str):
    given = arguments(SERVED[name])
    testing.assert_close(evaluate("cudnn", given), oracle(given), max_rel=1e-5, what=name)


@pytest.mark.usefixtures("as_xla")
def test_cudnn_gives_nothing_to_queries_that_see_nothing():
    """Padding, a bias of -inf, and a document that the keys do not have: zeros and zero gradients, no NaN."""
    given = arguments(SERVED["packed, all keys, bias"])
    segments = np.asarray(given["segment_ids"])
    given["segment_ids"] = (jnp.asarray(np.where(segments == 1, 99, segments)), given["segment_ids"])
    given["bias"] = given["bias"].at[:, :, 9].set(-jnp.inf)
    found = evaluate("cudnn", given)
    assert not np.asarray(found[0])[segments == 1].any()
    assert not np.asarray(found[0])[:, 9].any()
    testing.assert_close(found, oracle(given), max_rel=1e-5)


@pytest.mark.usefixtures("as_xla")
def test_cudnn_isolates_documents_to_the_bit():
    given = arguments(SERVED["packed window"])
    fn = functools.partial(attention, window=given.pop("window"), implementation="cudnn")
    testing.check_isolation(fn, given, np.asarray(given["segment_ids"]), token_arguments=["q", "k", "v"])


@pytest.mark.usefixtures("cudnn_version")
@pytest.mark.parametrize("segments", [False, True])
def test_cudnn_lowering(segments: bool):
    B, T, N, K, H = 1, 64, 4, 2, 64
    q, kv = (jax.ShapeDtypeStruct((B, T, heads, H), jnp.bfloat16) for heads in (N, K))
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32) if segments else None

    def fn(q: Any, k: Any, v: Any, ids: Any) -> Any:
        op = functools.partial(attention, segment_ids=ids, window=16, scale=0.25, implementation="cudnn")
        return testing.value_and_grads(op, {"q": q, "k": k, "v": v}, cotangent=q)

    with dispatch.target_platform("gpu"):
        text = jax.jit(fn).trace(q, kv, kv, ids).lower(lowering_platforms=("cuda",)).as_text()
    name = "ScaleBiasSoftmax" if segments else "Softmax"
    for call in (f"@__cudnn$fmha{name}(", f"@__cudnn$fmha{name}Backward("):
        assert text.count(call) == 1
    for option in ("mask_type", "CAUSAL", "sliding_window_length", "fmha_scale"):
        assert option in text
    assert text.count(r"\22sliding_window_length\22: 16") == 2
    assert text.count(r"\22fmha_scale\22: 0.25") == 2
    assert text.count(r"\22mask_type\22: \22CAUSAL\22") == 2


def described(**change: Any) -> dict[str, Any]:
    B, T, N, K, H = 2, 64, 4, 2, 64
    q, kv = (jax.ShapeDtypeStruct((B, T, heads, H), jnp.bfloat16) for heads in (N, K))
    nothing: dict[str, Any] = dict.fromkeys(("window", "segment_ids", "positions", "sinks", "softcap", "bias"))
    return {"q": q, "k": kv, "v": kv, "causal": True, "scale": 1.0, "return_lse": False, **nothing, **change}


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


IDS = (shape(2, 64, dtype=jnp.int32),) * 2
LONG = shape(2, 16384, 4, 64)
SHORT = {"k": shape(2, 32, 2, 64), "v": shape(2, 32, 2, 64)}
HALF = dict.fromkeys("qkv", shape(2, 64, 4, 64, dtype=jnp.float16))


@pytest.mark.usefixtures("cudnn_version")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"segment_ids": IDS, "bias": shape(1, 4, 64, 64), "window": 7}, None),
        (HALF, None),
        ({"return_lse": True}, "no gradient"),
        ({"sinks": shape(4)}, "no sinks"),
        ({"softcap": 2.0}, "no softcap"),
        ({"positions": (IDS[0], None)}, "explicit positions"),
        (SHORT, "T=64 causal queries of S=32 keys"),
        ({"causal": False, **SHORT}, None),
        (dict.fromkeys("qkv", shape(2, 64, 4, 64, dtype=jnp.float32)), "inputs of float32"),
        ({"v": shape(2, 64, 2, 128)}, "keys of 64 numbers and values of 128"),
        (HALF | {"segment_ids": IDS}, "too narrow"),
        ({"bias": shape(1, 1, 64, 64, dtype=jnp.float32)}, "a bias of float32"),
        (dict.fromkeys("qkv", LONG) | {"segment_ids": (shape(2, 16384, dtype=jnp.int32),) * 2}, r"\(2, 1, 16384, 16384\) mask"),
        (dict.fromkeys("qkv", LONG), None),
        (dict.fromkeys("qkv", shape(2, 64, 4, 20)), "JAX refuses it: The head dim must be"),
        (
            dict.fromkeys("qkv", shape(2, 63, 4, 64)) | {"segment_ids": (shape(2, 63, dtype=jnp.int32),) * 2},
            "JAX refuses it: Unsupported sequence length",
        ),
    ],
)
def test_cudnn_refusals_say_why(change: dict[str, Any], reason: str | None):
    with dispatch.target_platform("gpu"):
        found = dispatch.plan("attention", "cudnn", **described(**change))["cudnn"]
    assert found is None if reason is None else found is not None and re.search(reason, found), found


def test_a_jax_without_cudnn_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing() -> int:
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", missing)
    assert "planned for cpu" in dispatch.plan("attention", "cudnn", **described())["cudnn"]
    with dispatch.target_platform("gpu"):
        assert "JAX refuses it: cuDNN is not detected" in dispatch.plan("attention", "cudnn", **described())["cudnn"]
