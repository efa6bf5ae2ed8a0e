"""Rotary positions: scores depend on distance alone, and position 0 is the identity."""

import jax.numpy as jnp
import numpy as np

from mlt.nn.rope import apply_rope


def test_scores_depend_on_distance():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 1, 16)).astype(np.float32)

    def score(tq: int, tk: int) -> float:
        rotated = [apply_rope(jnp.asarray(x), jnp.array([[t]]), base=10_000.0) for x, t in ((q, tq), (k, tk))]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert abs(score(7, 3) - score(104, 100)) < 1e-4
    assert abs(score(7, 3) - score(3, 7)) > 1e-3


def test_first_pair_turns_by_one_radian_per_position():
    x = jnp.zeros((1, 2, 1, 4)).at[..., 0].set(1.0)
    y = apply_rope(x, jnp.array([[0, 1]]), base=100.0)
    np.testing.assert_allclose(y[0, 0, 0], [1, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(y[0, 1, 0], [np.cos(1), 0, np.sin(1), 0], atol=1e-6)
