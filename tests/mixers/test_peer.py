"""PEER: every expert run in float64, and only the chosen ones counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels.testing import assert_close, positions, segment_ids

from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.channel.peer import PEER
from mlt.nn.param import initialize
from mlt.parallel.rules import Rules

D = 16
INFO = BuildInfo(d_model=D, num_sub_layers=4, vocab_size=64)
CONFIG = PEER(num_keys=6, num_selected=4, num_heads=2, key_dim=8)


def inputs(seed=0):
    segments = segment_ids(seed, 2, 17)
    x = np.random.default_rng(seed).standard_normal((2, 17, D)).astype(np.float32)
    ids = jnp.zeros(segments.shape, jnp.int32)
    return jnp.asarray(x), Context(ids, jnp.asarray(segments), jnp.asarray(positions(segments)), Rules(), True)


def plain(mixer, x, is_token):
    """All num_keys^2 experts of every head, those below the K-th best score weighed zero."""
    config = mixer.config
    q = jnp.einsum("btd,dhk->bthk", x, mixer.query.kernel[...])
    q = q / jnp.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) * mixer.query_norm.scale[...]
    first, second = mixer.keys[...]
    keys = jnp.concatenate([jnp.repeat(first, config.num_keys, axis=1), jnp.tile(second, (1, config.num_keys, 1))], axis=-1)
    scores = jnp.einsum("bthk,hnk->bthn", q, keys)
    least = jnp.sort(scores, axis=-1)[..., -config.num_selected, None]
    weights = jax.nn.softmax(jnp.where(scores >= least, scores, -jnp.inf), axis=-1).sum(2)
    neurons = jax.nn.gelu(x @ mixer.up[...].T, approximate=False)
    return jnp.where(is_token[..., None], weights * neurons, 0.0) @ mixer.down[...]


def test_values_and_gradients_match_all_experts_run():
    mixer = initialize(CONFIG.build(INFO), 0)
    x, ctx = inputs()
    is_token = np.asarray(ctx.is_token)

    def total(run):
        def fn(mixer, x):
            y = jnp.where(is_token[..., None], run(mixer, x), 0.0)
            return (y**2).sum(), y

        return jax.jit(jax.value_and_grad(fn, (0, 1), has_aux=True))

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (mixer, x))
        want = jax.tree.map(np.asarray, total(lambda m, x: plain(m, x, is_token))(*exact))
    got = total(lambda m, x: m(x, ctx)[0])(mixer, x)
    for (path, value), found in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        assert_close(found, value, max_rel=1e-5, what=jax.tree_util.keystr(path))


def test_all_experts_with_a_linear_neuron_are_one_matrix():
    """With every expert chosen by one head and equal keys, weights are 1/N: y = (1/N) sum_n act(u_n x) v_n."""
    config = PEER(num_keys=3, num_selected=9, num_heads=1, key_dim=4, activation="relu")
    mixer = initialize(config.build(INFO), 0)
    mixer.keys = mixer.keys.replace(jnp.zeros_like(mixer.keys[...]))
    x, ctx = inputs(seed=1)
    want = jax.nn.relu(x @ mixer.up[...].T) @ mixer.down[...] / 9
    got = mixer(x, ctx)[0]
    where = np.asarray(ctx.is_token)
    assert_close(np.asarray(got)[where], np.asarray(want)[where], max_rel=2e-6)
    assert not np.asarray(got)[~where].any()


@pytest.mark.parametrize(("fields", "path"), [({"num_selected": 65}, "num_selected"), ({"key_dim": 5}, "key_dim")])
def test_problems(fields, path):
    config = PEER(**{"num_keys": 8, "num_selected": 4, **fields})
    assert [problem.path for problem in config.problems()] == [path]
