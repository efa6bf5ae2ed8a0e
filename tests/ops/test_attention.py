"""Attention against its float64 oracle, isolation and causality to the bit, and what it must never build or read."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import dispatch, testing
from mlt_kernels.attention import EMPTY_LSE, attention, merge
from mlt_kernels.attention.cases import TESTS, Case, arguments

CLOSE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def with_lse(implementation: str, **given: Any) -> dict[str, Any]:
    """Output, log-sum-exp (0 where empty) and which queries are empty, all of them to be compared."""
    out, lse = attention(**given, return_lse=True, implementation=implementation)
    empty = lse <= EMPTY_LSE / 2
    return {"out": out, "lse": jnp.where(empty, 0, lse), "empty": empty}


def static(argument: Any) -> bool:
    return isinstance(argument, (bool, int, float))


def evaluate(implementation: str, given: dict[str, Any]) -> Any:
    options = {name: x for name, x in given.items() if static(x)}
    arrays = {name: x for name, x in given.items() if not static(x)}
    fn = functools.partial(with_lse, implementation, **options)
    return jax.jit(lambda arrays: testing.value_and_grads(fn, arrays))(arrays)


def oracle(given: dict[str, Any]) -> Any:
    with jax.enable_x64(True):
        arrays = {k: x if static(x) else testing.cast_floating(x, jnp.float64) for k, x in given.items()}
        return jax.tree.map(np.asarray, evaluate("reference", arrays))


@pytest.mark.parametrize("name", TESTS)
def test_values_and_gradients(name: str):
    given = arguments(TESTS[name])
    testing.assert_close(evaluate("chunked", given), oracle(given), max_rel=CLOSE[jnp.float32])


def test_bfloat16():
    given = arguments(TESTS["packed_window"], dtype=jnp.bfloat16)
    values, gradients = evaluate("chunked", given)
    assert values["out"].dtype == jnp.bfloat16
    assert values["lse"].dtype == jnp.float32
    testing.assert_close((values, gradients), oracle(given), max_rel=CLOSE[jnp.bfloat16])


def test_float64_is_exact():
    with jax.enable_x64(True):
        given = arguments(TESTS["packed_all_keys"], dtype=jnp.float64)
        testing.assert_close(evaluate("chunked", given), evaluate("reference", given), max_rel=1e-13)


def test_reference_against_a_loop_over_pairs():
    """The oracle itself, on one packed row with grouped heads, window, sinks, softcap and bias."""
    options = {"window": 4, "softcap": 3.0}
    case = dataclasses.replace(TESTS["everything"], B=1, T=12, N=2, K=1, documents=5.0, options=options)
    given = {k: np.asarray(x, np.float64) if hasattr(x, "dtype") else x for k, x in arguments(case).items()}
    q, k, v, segments = given["q"], given["k"], given["v"], given["segment_ids"]
    out, lse = np.zeros((1, 12, 2, 8)), np.zeros((1, 12, 2))
    for t in range(12):
        for n in range(2):
            seen = [s for s in range(max(0, t - 3), t + 1) if segments[0, s] == segments[0, t] != 0]
            scores = [3.0 * np.tanh(q[0, t, n] @ k[0, s, 0] * 12**-0.5 / 3.0) + given["bias"][0, n, t, s] for s in seen]
            weights = np.exp(np.array([*scores, given["sinks"][n]]))
            lse[0, t, n] = np.log(weights.sum())
            for s, weight in zip(seen, weights, strict=False):
                out[0, t, n] += weight / weights.sum() * v[0, s, 0]
    result = attention(**arguments(case), return_lse=True, implementation="reference")
    testing.assert_close(result, (out, lse), max_rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"window": 20, "softcap": 3.0}], ids=["plain", "window"])
def test_documents_are_isolated_to_the_bit(options: dict[str, Any]):
    given = arguments(Case(B=2, T=140, N=4, K=2, documents=25.0, options=options))
    fn = functools.partial(attention, return_lse=True, **options)
    arrays = {name: given[name] for name in ("q", "k", "v", "segment_ids")}
    testing.check_isolation(fn, arrays, np.asarray(given["segment_ids"]), token_arguments=("q", "k", "v"))


def test_other_document_borders_change_no_bit():
    """The blocks that a document visits depend on its neighbours' lengths; its numbers must not."""
    given = arguments(Case(B=1, T=260, N=2, K=1))
    borders = [np.repeat([1, 2, 3], n).astype(np.int32)[None] for n in ((100, 70, 90), (5, 95, 160))]
    borders[1][0, 100:170] = 7
    run = jax.jit(lambda seg: testing.value_and_grads(functools.partial(attention, segment_ids=seg), given))
    kept = [jax.tree.map(lambda x: x[:, 100:170], run(jnp.asarray(seg))) for seg in borders]
    testing.assert_same_bits(*kept)


def test_the_future_changes_no_bit():
    given = arguments(Case(B=1, T=140, N=2, K=1))
    testing.check_causality(attention, given, token_arguments=("q", "k", "v"), positions=[1, 63, 64, 100])


def test_queries_that_see_nothing():
    given = arguments(Case(B=1, T=70, N=2, K=1))
    given["segment_ids"] = jnp.asarray([[0] * 5 + [1] * 20 + [0] * 45], jnp.int32)
    empty = np.asarray(given["segment_ids"][0]) == 0
    for implementation in ("chunked", "reference"):
        fn = functools.partial(attention, return_lse=True, implementation=implementation)
        (out, lse), gradients = jax.jit(functools.partial(testing.value_and_grads, fn))(given)
        assert (np.asarray(out)[0, empty] == 0).all()
        assert (np.asarray(lse)[0, empty] == EMPTY_LSE).all()
        for gradient in gradients.values():
            assert np.isfinite(gradient).all()
            assert (np.asarray(gradient)[0, empty] == 0).all()


@pytest.mark.parametrize("what", ["window", "document", "cache"])
def test_hidden_blocks_are_not_read(what: str):
    """NaN in hidden keys would spread through 0 * NaN if their block were visited."""
    T, S, hidden, asking = 512, 512, slice(0, 256), slice(400, None)
    if what == "window":
        options: dict[str, Any] = {"window": 32}
    elif what == "document":
        options = {"segment_ids": jnp.asarray(np.repeat([1, 2], T // 2)[None], jnp.int32)}
    else:
        T, S, hidden, asking = 1, 16384, slice(8192, None), slice(None)
        slots = jnp.asarray((np.arange(S) < 200).astype(np.int32)[None])
        options = {"segment_ids": (jnp.ones((1, 1), jnp.int32), slots), "positions": (jnp.full((1, 1), 199), None)}
    given = arguments(Case(B=1, T=T, S=S, N=2, K=1))
    poisoned = given | {name: given[name].at[:, hidden].set(jnp.nan) for name in ("k", "v")}
    run = jax.jit(lambda arrays: attention(**arrays, **options)[:, asking])
    testing.assert_same_bits(run(poisoned), run(given))


def test_merge_of_two_key_sets_is_the_whole():
    given = arguments(Case(B=2, T=60, S=130, N=4, K=2))
    at = jnp.broadcast_to(jnp.arange(130, dtype=jnp.int32), (2, 130))
    seen_from = at[:, 70:] % 97  # some queries see no key of the second part, some only one of the first

    def split(q: Any, k: Any, v: Any) -> Any:
        parts = [
            attention(q, k[:, s], v[:, s], positions=(seen_from, at[:, s]), return_lse=True)
            for s in (slice(0, 50), slice(50, None))
        ]
        return merge(parts)

    def whole(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, positions=(seen_from, at), return_lse=True, implementation="reference")

    got = jax.jit(functools.partial(testing.value_and_grads, split))(given)
    with jax.enable_x64(True):
        wide = testing.cast_floating(given, jnp.float64)
        want = jax.tree.map(np.asarray, jax.jit(functools.partial(testing.value_and_grads, whole))(wide))
    testing.assert_close(got, want, max_rel=1e-5)


def test_merge_of_nothing_stays_empty():
    nothing = (jnp.zeros((1, 2, 1, 3)), jnp.full((1, 2, 1), EMPTY_LSE))
    twice = dict(zip("abcd", nothing * 2, strict=True))
    (out, lse), gradients = testing.value_and_grads(lambda a, b, c, d: merge([(a, b), (c, d)]), twice)
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(lse) <= EMPTY_LSE / 2).all()
    assert all(np.isfinite(g).all() for g in gradients.values())


def test_large_bias():
    """Scores far outside the range of exp, on rows that do not fill their block either."""
    given = arguments(TESTS["head_bias"])
    given["bias"] = given["bias"] * 300
    testing.assert_close(evaluate("chunked", given), oracle(given), max_rel=1e-5)


def test_no_array_grows_with_queries_times_keys():
    given = arguments(Case(B=1, T=1024, N=4, K=2, documents=100.0))
    largest = testing.largest_array_in(lambda a: testing.value_and_grads(attention, a), given)
    assert largest < 1024 * 1024 // 8


def test_vmap_equals_a_loop():
    """Rows with borders of their own, so that the mapped loops run for different numbers of blocks."""
    given = arguments(Case(B=2, T=100, N=2, K=1, documents=30.0))
    stacked = {name: x[:, None] for name, x in given.items()}
    mapped = jax.jit(jax.vmap(lambda row: attention(**row)))(stacked)
    testing.assert_close(mapped[:, 0], attention(**given, implementation="reference"), max_rel=1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform: str):
    given = arguments(TESTS["everything"], dtype=jnp.bfloat16)
    arrays = {name: x for name, x in given.items() if hasattr(x, "dtype")}
    fn = functools.partial(attention, implementation="chunked", window=40, softcap=3.0)
    with dispatch.target_platform("gpu" if platform == "cuda" else "tpu"):
        traced = jax.jit(lambda a: testing.value_and_grads(fn, a)).trace(arrays)
        assert "while" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((2, 8, 3, 4)), "v": jnp.zeros((2, 8, 3, 4))}, "K=3 .* must divide N=4"),
        ({"causal": False, "window": 4}, "expected causal=True"),
        ({"window": 0}, "window=0; expected an integer of at least 1"),
        ({"softcap": 0.0}, "expected a positive number"),
        ({"k": jnp.zeros((2, 9, 2, 4)), "v": jnp.zeros((2, 9, 2, 4)), "segment_ids": jnp.ones((2, 8), int)}, "expected a pair"),
        ({"segment_ids": (jnp.ones((2, 8), int),)}, "has 1 entries; expected two"),
        ({"positions": (jnp.ones((2, 7), int), None)}, "positions of the queries has shape"),
        ({"bias": jnp.zeros((2, 4, 8))}, "expected four dims"),
        ({"bias": jnp.zeros((2, 2, 8, 8))}, "each 1 or that of"),
        ({"sinks": jnp.zeros(3)}, "sinks has shape"),
        ({"implementation": "chunky"}, "did you mean 'chunked'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str):
    given = {"q": jnp.zeros((2, 8, 4, 4)), "k": jnp.zeros((2, 8, 2, 4)), "v": jnp.zeros((2, 8, 2, 4))}
    with pytest.raises(ValueError, match=message):
        attention(**(given | change))
