"""Ops on a sequence split over devices compute what one device computes, values and gradients, wherever documents end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.parallel import carry, crossings, ops
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules

B, T, H, HK, K, V = 2, 64, 4, 2, 8, 4
ONE = Rules(None)

# Rows of 64 tokens, shards of 16 (or 8): documents that end and start on an edge, cover shards whole, lie inside one, start
# with a shard's last token or end with its first, and a row that is padding from inside a shard on.
ROWS = [
    [(1, 16), (2, 15), (3, 1), (4, 1), (5, 31)],
    [(1, 5), (2, 36), (0, 23)],
]
SEGMENTS = np.array([np.concatenate([np.full(size, name) for name, size in row]) for row in ROWS], np.int32)


def rules(context: int, tensor: int = 1) -> Rules:
    layout = Layout(context=context, tensor=tensor)
    return Rules(layout.build(jax.devices()[: context * tensor]))


def compare(call, arrays: dict, layout: Rules, tolerance: float = 1e-5) -> None:
    """`call(rules, **arrays)` on one device and on the layout: result and gradient of every array, padding left out."""
    real = jnp.asarray(SEGMENTS != 0)
    rng = np.random.default_rng(9)

    def loss(arrays, rules):
        y = call(rules, **arrays)
        y = jnp.where(real.reshape(*real.shape, *[1] * (y.ndim - 2)), y, 0)
        return jnp.sum(y * cotangent.astype(y.dtype)).real, y

    shape = jax.eval_shape(lambda a: call(ONE, **a), arrays).shape
    cotangent = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
        (expected, y), (found, y2) = run(arrays, ONE), run(arrays, layout)
    for name, value in {"y": y, **expected}.items():
        other = y2 if name == "y" else found[name]
        error = np.linalg.norm(np.asarray(other) - np.asarray(value)) / np.linalg.norm(value)
        assert error < tolerance, f"{name}: {error:.1e}"


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def decay(seed: int, *shape: int) -> jax.Array:
    """Log decays from strong to none, some of them resets in all but name."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(-rng.exponential(0.1, shape) - 60.0 * (rng.random(shape) < 0.02), jnp.float32)


def unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


QKV = {"q_BTHK": normal(0, B, T, HK, K), "k_BTHK": unit(normal(1, B, T, HK, K)), "v_BTHV": normal(2, B, T, H, V)}
BETA = jax.nn.sigmoid(normal(3, B, T, H)) * 2
RECURRENCES = {
    "no_decay": ({}, {}),
    "head": ({"log_decay": -jnp.arange(1.0, H + 1) / 20}, {}),
    "scalar": ({"log_decay": decay(4, B, T, H), "beta": BETA}, {}),
    "vector": ({"log_decay": decay(5, B, T, H, K)}, {}),
    "delta": ({"log_decay": decay(4, B, T, H), "beta": BETA}, {"rule": "delta"}),
    "kda": ({"log_decay": decay(5, B, T, H, K), "beta": BETA}, {"rule": "delta"}),
    "mlstm": ({"log_decay": decay(4, B, T, H), "log_input": 3 * normal(6, B, T, H)}, {"normalizer": "mlstm"}),
}


EXCHANGED = [(name, exchange) for name in ("scalar", "delta") for exchange in carry.EXCHANGES]
EXCHANGED += [("no_decay", "gather"), ("head", "permute"), ("vector", "ring"), ("kda", "permute")]
EXCHANGED += [("mlstm", "gather"), ("mlstm", "ring")]


@pytest.mark.parametrize(("name", "exchange"), EXCHANGED)
def test_linear_recurrence(name, exchange):
    gates, options = RECURRENCES[name]

    def call(rules, **arrays):
        return ops.linear_recurrence(rules.exchanging(exchange), **arrays, segment_ids=SEGMENTS, chunk_size=8, **options)

    compare(call, {**QKV, **gates}, rules(4, 2 if exchange == "gather" else 1))


def test_sum_normalizer():
    arrays = {**QKV, "log_decay": -jnp.abs(normal(4, B, T, H)) / 10, "log_input": 20 * normal(6, B, T, H) - 60}
    arrays = {name: jnp.abs(x) if name in ("q_BTHK", "k_BTHK") else x for name, x in arrays.items()}

    def call(rules, **arrays):
        own = rules.exchanging("permute")
        return ops.linear_recurrence(own, **arrays, segment_ids=SEGMENTS, normalizer="sum", chunk_size=8)

    compare(call, arrays, rules(8))


@pytest.mark.parametrize(("exchange", "complex_"), [("gather", False), ("permute", True), ("ring", False)])
def test_diagonal_recurrence(exchange, complex_):
    arrays = {"a": jnp.exp(decay(0, B, T, 8)), "b": normal(1, B, T, 8)}

    def call(rules, a, b):
        if complex_:
            a = a * jnp.exp(1j * normal(2, B, T, 8))
        return ops.diagonal_recurrence(rules.exchanging(exchange), a, b.astype(a.dtype), segment_ids=SEGMENTS).real

    compare(call, arrays, rules(8))


def test_selective_scan():
    arrays = {"x_BTD": normal(0, B, T, 4), "step_BTD": jax.nn.softplus(normal(1, B, T, 4)), "A_DN": -jnp.exp(normal(2, 4, 3))}
    arrays |= {"B_BTN": normal(3, B, T, 3), "C_BTN": normal(4, B, T, 3), "skip": normal(5, 4)}

    def call(rules, **arrays):
        return ops.selective_scan(rules.exchanging("ring"), **arrays, segment_ids=SEGMENTS)

    compare(call, arrays, rules(4, 2))


@pytest.mark.parametrize(("width", "dilation"), [(4, 1), (4, 3)])
def test_causal_conv(width, dilation):
    """With dilation 3 a tap reaches over a whole shard of 8 tokens."""
    arrays = {"x_BTD": normal(0, B, T, 8), "kernel_WD": normal(1, width, 8), "bias": normal(2, 8)}

    def call(rules, **arrays):
        return ops.causal_conv(rules, **arrays, segment_ids=SEGMENTS, activation="silu", dilation=dilation)

    compare(call, arrays, rules(8))


ATTENTION = [
    ("gather", None, 8),
    ("ring", None, 4),
    ("zigzag", None, 4),
    ("zigzag", 11, 4),
    ("heads", None, 4),
    ("heads_ring", None, 8),
    ("window", 11, 4),
    ("window", 30, 8),
]


@pytest.mark.parametrize(("strategy", "window", "size"), ATTENTION)
def test_attention(strategy, window, size):
    arrays = {"q_BTNH": normal(0, B, T, 4, K), "k_BTKH": normal(1, B, T, 2, K), "v_BTKP": normal(2, B, T, 2, V)}
    arrays["sinks"] = normal(3, 4)

    def call(rules, **arrays):
        return ops.attention(rules.exchanging(strategy), **arrays, segment_ids=SEGMENTS, window=window, softcap=5.0)

    compare(call, arrays, rules(size))


def test_the_cheapest_strategy_is_taken():
    wide = {"tokens": 4096, "heads": 32, "kv_heads": 8, "size": 8}
    assert crossings.choose(**wide, window=None) == "heads"
    assert crossings.choose(**{**wide, "heads": 12, "kv_heads": 12}, window=None) == "heads_ring"
    assert crossings.choose(**{**wide, "heads": 9, "kv_heads": 1}, window=None) == "zigzag"
    assert crossings.choose(**{**wide, "heads": 9, "kv_heads": 1, "tokens": 4104}, window=None) == "ring"
    assert crossings.choose(**wide, window=128) == "window"


def test_a_strategy_that_cannot_run_says_why():
    shape = {"tokens": 4104, "heads": 4, "kv_heads": 3, "size": 8, "window": None}
    assert crossings.refusal("window", **shape) == "needs a window"
    assert "multiple of 2 * 8 tokens, got 4104" in crossings.refusal("zigzag", **shape)
    assert "divide the 4 heads" in crossings.refusal("heads", **shape)
    assert "is none of gather, window" in crossings.refusal("permute", **shape)
    assert crossings.refusal("ring", **shape) is None
