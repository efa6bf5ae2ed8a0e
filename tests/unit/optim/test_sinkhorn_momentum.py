"""Momentum with balanced rows and columns: the recursion in float64, what it keeps, layouts, resuming, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mlt.config.problems import collect_problems
from mlt.nn.param import ParamSpec, normal
from mlt.optim.adamw import AdamW
from mlt.optim.base import state_shardings
from mlt.optim.schedule import WarmupCosine
from mlt.optim.sinkhorn_momentum import SinkhornMomentum
from mlt.optim.table import apply_updates
from mlt.parallel.mesh import Layout

M, V = 24, 8
TABLE = SinkhornMomentum()
STEADY = WarmupCosine(warmup_steps=0, final_fraction=1.0)
CONFIG = AdamW(learning_rate=0.02, tables=TABLE)


def balanced(update: np.ndarray) -> np.ndarray:
    """Row by row and column by column, in float64."""
    u = np.array(update, np.float64)
    norms = np.array([np.sqrt(np.sum(row**2)) for row in u])
    u[norms <= 1e-3 * norms.mean()] = 0
    for turn in range(11):
        for line in u if turn % 2 == 0 else u.T:
            line /= np.sqrt(np.sum(line**2)) + 1e-20
    return u


def gradients(count: int, rows: int = M) -> list[np.ndarray]:
    """Zipf-like: some rows a thousand times larger than others, some never read, one below the threshold."""
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        grad = rng.standard_normal((rows, V)) * 10.0 ** -rng.integers(0, 3, (rows, 1)) * 2.0 ** rng.integers(0, 4, V)
        grad[rng.random(rows) < 0.3] = 0
        grad[-3:] = 0
        grad[0] = 1e-7
        made.append(grad.astype(np.float32))
    return made


def described(shape: tuple[int, ...]):
    axes = (*(["layers"] if len(shape) == 3 else []), "memory", None)
    return {"table": ParamSpec(shape, axes, normal(0.02), group="table")}


def run(steps, value, *, state=None, config=CONFIG):
    optimizer = config.transformation(described(value.shape), STEADY, 10)
    params = {"table": jnp.asarray(value)}
    state = optimizer.init(params) if state is None else state
    for grad in steps:
        updates, state = jax.jit(optimizer.update)({"table": jnp.asarray(grad)}, state, params)
        params = apply_updates(params, updates)
    assert np.isfinite(params["table"]).all()
    return np.asarray(params["table"]), state


def test_steps_against_a_loop():
    value = np.random.default_rng(1).standard_normal((M, V)).astype(np.float32)
    found, state = run(gradients(4), value)
    expected, momentum = value.astype(np.float64), np.zeros((M, V))
    for grad in gradients(4):
        momentum = 0.95 * momentum + 0.05 * grad
        expected -= 0.02 * 5 * 0.18 * V**0.5 * balanced(0.95 * momentum + 0.05 * grad)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(state["tables"]["momentum"]["table"], momentum, atol=1e-7)
    # Rows that were never read, and one whose gradient is noise, have not moved: no decay either.
    np.testing.assert_array_equal(found[[0, -3, -2, -1]], value[[0, -3, -2, -1]])
    assert (found[1:-3] != value[1:-3]).any(-1).sum() > M // 2


def test_rows_are_equal_and_columns_nearly_so():
    update = jnp.asarray(gradients(1, rows=200)[0])
    u = np.asarray(jax.jit(TABLE.balanced)(update), np.float64)
    norms = np.sqrt((u**2).sum(-1))
    alive = norms > 0
    np.testing.assert_allclose(norms[alive], 1, atol=1e-6)
    columns = np.sqrt((u**2).mean(0))
    before = np.sqrt((np.asarray(update, np.float64) ** 2).mean(0))
    assert before.max() / before.min() > 4
    np.testing.assert_allclose(columns, columns.mean(), rtol=1e-3)
    once = np.sqrt((np.asarray(TABLE.replace(iterations=1).balanced(update)) ** 2).mean(0))
    assert once.max() / once.min() > 2


def test_a_balanced_update_is_that_of_nesterov_up_to_its_scale():
    signs = np.ones((1, 1))
    for _ in range(3):
        signs = np.block([[signs, signs], [signs, -signs]])
    direction, slots = TABLE.step({"momentum": jnp.zeros((8, 8))}, jnp.asarray(7 * signs, jnp.float32), jnp.int32(1))
    np.testing.assert_allclose(direction, 0.18 * signs, rtol=1e-6)
    np.testing.assert_allclose(slots["momentum"], 0.05 * 7 * signs, rtol=1e-6)


def test_stacked_tables_are_balanced_one_by_one():
    first, second = gradients(2)
    both = TABLE.balanced(jnp.stack([first, 100 * second]))
    for found, update in zip(both, (first, second), strict=True):
        np.testing.assert_allclose(found, TABLE.balanced(jnp.asarray(update)), rtol=1e-5, atol=1e-7)


def test_owners_of_rows_compute_what_one_device_does():
    value = np.random.default_rng(1).standard_normal((M, V)).astype(np.float32)
    rules = Layout(fsdp=4, context=2).rules(jax.devices()[:8])
    specs = described((M, V))
    optimizer = CONFIG.transformation(specs, STEADY, 10)
    place = rules.param_shardings(specs)["table"]
    assert place == NamedSharding(rules.mesh, PartitionSpec("fsdp", None))
    params = {"table": jax.device_put(value, place)}
    state = optimizer.init(params)
    held = state_shardings(jax.eval_shape(optimizer.init, params), specs, rules)
    assert held["tables"]["momentum"]["table"].spec == place.spec
    update = jax.jit(optimizer.update, out_shardings=({"table": place}, held))
    for grad in gradients(3):
        updates, state = update({"table": jax.device_put(grad, place)}, state, params)
        params = apply_updates(params, updates)
    np.testing.assert_allclose(params["table"], run(gradients(3), value)[0], rtol=0, atol=1e-6)


def test_going_on_from_a_kept_state_changes_no_bit():
    value, steps = np.random.default_rng(1).standard_normal((M, V)).astype(np.float32), gradients(4)
    whole, _ = run(steps, value)
    part, state = run(steps[:2], value)
    kept = jax.tree.map(np.asarray, state)
    np.testing.assert_array_equal(run(steps[2:], part, state=jax.tree.map(jnp.asarray, kept))[0], whole)


@pytest.mark.parametrize(
    ("fields", "path"),
    [({"beta": 1.0}, "beta"), ({"iterations": 10}, "iterations"), ({"tau": -1.0}, "tau"), ({"scale": 0.0}, "scale")],
)
def test_problems(fields, path):
    assert [problem.path for problem in collect_problems(TABLE.replace(**fields))] == [path]
