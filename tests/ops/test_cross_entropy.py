"""Cross-entropy against its float64 oracle, and the logits that must never exist."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels import testing
from mlt_kernels.cross_entropy import cross_entropy
from mlt_kernels.cross_entropy.cases import TESTS, Case, arguments


def static(argument: Any) -> bool:
    return isinstance(argument, (bool, int, float))


def evaluate(implementation: str, given: dict[str, Any]) -> Any:
    options = {name: x for name, x in given.items() if static(x)}
    fn = functools.partial(cross_entropy, return_lse=True, implementation=implementation, **options)
    arrays = {name: x for name, x in given.items() if name not in options}
    return jax.jit(lambda arrays: testing.value_and_grads(fn, arrays))(arrays)


def oracle(given: dict[str, Any]) -> Any:
    with jax.enable_x64(True):
        arrays = {name: x if static(x) else testing.cast_floating(x, jnp.float64) for name, x in given.items()}
        return jax.tree.map(np.asarray, evaluate("reference", arrays))


@pytest.mark.parametrize("name", TESTS)
def test_values_and_gradients(name: str):
    given = arguments(TESTS[name])
    testing.assert_close(evaluate("chunked", given), oracle(given), max_rel=1e-5)


@pytest.mark.parametrize(("name", "dtype", "limit"), [("z_loss", jnp.float32, 1e-5), ("softcap", jnp.bfloat16, 2e-2)])
def test_a_sum_of_losses(name: str, dtype: Any, limit: float):
    """The loss alone under one cotangent for all tokens takes gradients made in the forward pass; other cotangents do not."""
    given = arguments(TESTS[name], dtype=dtype)
    options = {key: value for key, value in given.items() if static(value)}
    arrays = {key: value for key, value in given.items() if not static(value)}

    def run(implementation: str, cotangent: Any, arrays: dict[str, Any]) -> Any:
        fn = functools.partial(cross_entropy, implementation=implementation, **options)
        return testing.value_and_grads(fn, arrays, cotangent=cotangent)

    found = jax.jit(functools.partial(run, "chunked"))
    even = np.full(given["labels"].shape, 0.125, np.float32)
    uneven = even.copy()
    uneven[-1, -1] = 0.5
    for cotangent in (even, uneven):
        with jax.enable_x64(True):
            wide = testing.cast_floating(arrays, jnp.float64)
            want = jax.tree.map(np.asarray, run("reference", jnp.asarray(cotangent, jnp.float64), wide))
        testing.assert_close(found(jnp.asarray(cotangent), arrays), want, max_rel=limit)


def test_bfloat16():
    given = arguments(TESTS["softcap"], dtype=jnp.bfloat16)
    values, gradients = evaluate("chunked", given)
    assert all(x.dtype == jnp.float32 for x in values)
    testing.assert_close((values, gradients), oracle(given), max_rel=2e-2)


def test_float64_is_exact():
    with jax.enable_x64(True):
        given = arguments(TESTS["softcap"], dtype=jnp.float64)
        testing.assert_close(evaluate("chunked", given), evaluate("reference", given), max_rel=1e-13)


def test_unembedding_gradient_does_not_lose_digits_with_more_chunks():
    """In bfloat16 only the inputs round: the sum over chunks is float32."""
    given = arguments(Case(B=1, T=512, D=8, V=40, weights=False), dtype=jnp.bfloat16)
    want = oracle(given)[1]["unembedding"]
    errors = [
        testing.relative_error(evaluate("chunked", given | {"chunk_size": size})[1]["unembedding"], want) for size in (512, 4)
    ]
    assert errors[1] < errors[0] + 2e-3


def test_zero_weights_silence_any_label():
    given = arguments(Case(B=1, T=40, weights=False))
    given["weights"] = jnp.zeros((1, 40)).at[:, ::2].set(1.0)
    labels = np.array(given["labels"])
    fn = functools.partial(cross_entropy, chunk_size=16, z_loss=1e-3)
    run = jax.jit(lambda arrays: testing.value_and_grads(fn, arrays))
    results = []
    for junk in (0, -1, -(2**31), 101, 2**31 - 1):
        labels[:, 1::2] = junk
        loss, gradients = run(given | {"labels": jnp.asarray(labels)})
        assert (np.asarray(loss)[:, 1::2] == 0).all()
        assert (np.asarray(gradients["hidden"])[:, 1::2] == 0).all()
        assert np.isfinite(np.asarray(gradients["weights"])).all()
        results.append((loss, gradients["unembedding"]))
    for other in results[1:]:
        testing.assert_same_bits(other, results[0])


def test_a_vocabulary_in_two_parts():
    """The docstring's recipe: lse meet in a logsumexp, label logits in a sum; gradients follow."""
    given = arguments(Case(weights=False))
    hidden, unembedding, labels = given["hidden"], given["unembedding"], given["labels"]

    def split(hidden: Any, unembedding: Any) -> Any:
        lses, logits = [], []
        for first, columns in ((0, unembedding[:, :37]), (37, unembedding[:, 37:])):
            loss, lse = cross_entropy(hidden, columns, labels - first, chunk_size=20, return_lse=True)
            lses.append(lse)
            logits.append(lse - loss)
        return jax.nn.logsumexp(jnp.stack(lses), axis=0) - sum(logits)

    def whole(hidden: Any, unembedding: Any) -> Any:
        return cross_entropy(hidden, unembedding, labels, implementation="reference")

    both = {"hidden": hidden, "unembedding": unembedding}
    got = jax.jit(functools.partial(testing.value_and_grads, split))(both)
    with jax.enable_x64(True):
        wide = testing.cast_floating(both, jnp.float64)
        want = jax.tree.map(np.asarray, jax.jit(functools.partial(testing.value_and_grads, whole))(wide))
    testing.assert_close(got, want, max_rel=1e-5)


@pytest.mark.parametrize("return_lse", [True, False])
def test_tokens_do_not_touch_each_other(return_lse: bool):
    """Changing half of the tokens changes no bit of the loss and hidden gradient of the others."""
    given = arguments(Case(B=1, T=64, options={"chunk_size": 16}))
    options = {"chunk_size": given.pop("chunk_size")}
    segments = np.repeat(np.arange(1, 9), 8)[None].astype(np.int32)
    fn = functools.partial(cross_entropy, return_lse=return_lse, **options)
    testing.check_isolation(fn, given, segments, token_arguments=("hidden", "weights"))


def test_the_logits_never_exist_whole():
    B, T, V = 2, 512, 300
    given = arguments(Case(B=B, T=T, D=16, V=V))
    fn = functools.partial(cross_entropy, chunk_size=64)
    assert testing.largest_array_in(lambda a: testing.value_and_grads(fn, a), given) <= B * 64 * V


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unembedding": jnp.zeros((5, 7))}, "unembedding has shape .* with D=4 from hidden"),
        ({"weights": jnp.zeros((2, 8))}, "weights has shape"),
        ({"chunk_size": 0}, "chunk_size=0; expected an integer of at least 1"),
        ({"softcap": -1.0}, "expected a positive number"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str):
    given = {"hidden": jnp.zeros((2, 9, 4)), "unembedding": jnp.zeros((4, 7)), "labels": jnp.zeros((2, 9), int)}
    with pytest.raises(ValueError, match=message):
        cross_entropy(**(given | change))
