"""Engram over several residual streams: each is the layer of one stream with keys, norms and a gate of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels.testing import assert_close, check_isolation, positions, segment_ids

from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.channel.engram import Engram
from mlt.nn.param import initialize, named_leaves
from mlt.optim.muon import matrix_sides
from mlt.parallel.rules import Rules
from mlt.verify.material import lively

D, M = 16, 3
INFO = BuildInfo(d_model=D, num_sub_layers=9, vocab_size=1000)
SINGLE = Engram(
    layer_id=4, layer_ids=(1, 4), rows_per_head=40, head_dim=6, heads_per_order=2, compress_tokens=False, pad_token_id=2
)
SEVERAL = SINGLE.replace(branches=M)
FUSED = SEVERAL.replace(fused_projection=True)

run = jax.jit(lambda mixer, x, ctx: mixer(x, ctx)[0])
step = jax.jit(lambda mixer, x, state, ctx: mixer.step(x, state, ctx))


@functools.cache
def mixer_of(config: Engram):
    return lively(initialize(config.build(INFO), 0), 1, std=0.3)


def inputs(*, padding: bool = True, seed: int = 0):
    rng = np.random.default_rng(seed)
    segments = segment_ids(seed, 2, 40, padding=padding)
    ids = rng.choice([5, 17, 999, 0, 123], (2, 40)).astype(np.int32)
    x = rng.standard_normal((2, 40, M, D)).astype(np.float32)
    return jnp.asarray(x), Context(jnp.asarray(ids), jnp.asarray(segments), jnp.asarray(positions(segments)), Rules(), True)


def copied(single, several):
    """The layer of several streams with M copies of what one has."""
    source, at = dict(named_leaves(single)), {"key.kernel": 2, "conv.kernel": 1, "projection.kernel": 2}
    own = dict(named_leaves(several))

    def take(name, leaf):
        if name == "projection.kernel":
            key, value = source["key.kernel"], source["value.kernel"]
            return jnp.stack([*[key] * M, value], axis=2)
        return source[name] if leaf.shape == source[name].shape else jnp.stack([source[name]] * M, axis=at.get(name, 0))

    return jax.tree.unflatten(jax.tree.structure(several), [take(name, leaf) for name, leaf in own.items()])


@pytest.mark.parametrize("config", [SEVERAL, FUSED], ids=["separate", "fused"])
def test_copies_of_one_stream_s_keys_give_one_stream_s_layer(config):
    single, (x, ctx) = mixer_of(SINGLE), inputs()
    y = run(copied(single, mixer_of(config)), x, ctx)
    for m in range(M):
        assert_close(y[:, :, m], run(single, x[:, :, m], ctx), max_rel=2e-6)


def test_one_fused_matrix_is_keys_and_value():
    config = SINGLE.replace(fused_projection=True)
    single, (x, ctx) = mixer_of(SINGLE), inputs()
    fused = mixer_of(config)
    kernels = [single.key.kernel[...], single.value.kernel[...]]
    for name in ("table", "query_norm", "key_norm", "conv_norm", "conv"):
        setattr(fused, name, getattr(single, name))
    fused.projection.kernel = fused.projection.kernel.replace(jnp.stack(kernels, axis=2))
    assert_close(run(fused, x[:, :, 0], ctx), run(single, x[:, :, 0], ctx), max_rel=2e-6)
    fresh = np.asarray(initialize(FUSED.replace(head_dim=64).build(INFO), 0).projection.kernel[...])
    spread = fresh.std(axis=(0, 1, 3))
    np.testing.assert_allclose(spread * (4 * 64) ** 0.5, [1, 1, 1, 1 / 3], rtol=0.05)


def test_each_branch_has_keys_norms_a_gate_and_a_convolution():
    mixer, (x, ctx) = mixer_of(SEVERAL), inputs()
    same = jnp.broadcast_to(x[:, :, :1], x.shape)
    y = np.asarray(run(mixer, same, ctx))
    assert all(np.abs(y[:, :, 0] - y[:, :, m]).max() > 0.01 for m in range(1, M))
    grads = jax.jit(jax.grad(lambda mixer: (mixer(x, ctx)[0][:, :, 1] ** 2).sum(), allow_int=True))(mixer)
    own = {"key.kernel": 2, "query_norm.scale": 0, "key_norm.scale": 0, "conv_norm.scale": 0, "conv.kernel": 1}
    for name, at in own.items():
        moved = np.moveaxis(np.asarray(dict(named_leaves(grads))[name]), at, 0).reshape(M, -1)
        assert (np.abs(moved).max(-1) > 0).tolist() == [False, True, False], name


@pytest.mark.parametrize("config", [SEVERAL, FUSED.replace(conv=False, max_ngram=4)], ids=["paper", "v4_1"])
def test_decoding_in_chunks_equals_the_full_pass(config):
    mixer, (x, ctx) = mixer_of(config), inputs(padding=False, seed=4)
    full, state, at, parts = run(mixer, x, ctx), mixer.init_state(2, 40, jnp.float32), 0, []
    for size in (13, 1, 1, 13, *[1] * 12):
        part = jax.tree.map(lambda a: a[:, at : at + size], ctx)  # noqa: B023
        y, state = step(mixer, x[:, at : at + size], state, part)
        parts.append(y)
        at += size
    assert_close(jnp.concatenate(parts, axis=1), full, max_rel=1e-6)
    kept = sum(leaf[0].size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert config.state_size(D, 40) == kept


def test_documents_are_isolated_to_the_bit():
    mixer, (x, ctx) = mixer_of(SEVERAL), inputs(seed=3)
    check_isolation(lambda x: mixer(x, ctx)[0], {"x": x}, np.asarray(ctx.segment_ids), token_arguments=("x",))


def test_costs_are_the_published_ones():
    paper, released = (make(1, (1, 14), branches=4) for make in (Engram.as_in_paper, Engram.as_in_v4_1))
    assert paper.flops_per_token(2560, 4096) == 2 * 1280 * 2560 * 5 + 2 * 4 * 4 * 2560
    assert released.flops_per_token(5120, 4096) == 2 * 6144 * 5120 * 5
    assert paper.state_size(2560, 4096) == 9 * 4 * 2560
    module = released.build(BuildInfo(5120, 2, 300, tuple(map(str, range(300)))))
    shapes = {name: spec.shape for name, spec in named_leaves(module)}
    assert shapes["projection.kernel"] == (24, 256, 5, 5120)
    assert shapes["key_norm.scale"] == (4, 5120)
    assert not [name for name in shapes if name.startswith(("key.", "value.", "conv"))]


def test_muon_takes_the_keys_of_each_branch_for_a_matrix():
    sides = matrix_sides(dict(named_leaves(SEVERAL.build(INFO)))["key.kernel"])
    assert (sides.reduction_axis, sides.output_axis) == ((0, 1), (3,))
