"""Several residual streams: the equations of both kinds, the start as one stream, packing, decoding, layouts, costs, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels.testing import assert_close

from mlt.config.load import load_config
from mlt.config.problems import collect_problems
from mlt.errors import UserError
from mlt.export.huggingface.registry import write_config
from mlt.loss import context_of
from mlt.mixers.channel.engram import Engram
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.parallel import Parallel
from mlt.model.block import Block
from mlt.model.count import count
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.model.streams import HyperConnections, Mixing, Place, doubly_stochastic
from mlt.nn.param import initialize, named_leaves
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules
from mlt.train.distill import matched_layers
from mlt.verify.decode import decode
from mlt.verify.isolation import alone, isolation
from mlt.verify.material import lively, packed_rows
from mlt.verify.mesh import MeshStep, compare
from mlt.verify.model import Subject

D, M = 16, 3
MANIFOLD, FREE = HyperConnections(streams=M), HyperConnections(streams=M, kind="free")
ATTENTION, DENSE = Attention(num_heads=2, head_dim=8), SwiGLU(d_ff=24)
ENGRAM = Engram(layer_id=0, layer_ids=(0,), rows_per_head=40, head_dim=4, heads_per_order=2, branches=M, compress_tokens=False)
PLAIN = Stack(head=(Block(mixers=(DENSE,)),), period=(Block(mixers=(ATTENTION, DENSE)),), repeats=2)
MIXED = PLAIN.replace(head=(Block(mixers=(ENGRAM, ATTENTION, DENSE)),), hyper_connections=MANIFOLD)
SHALLOW = Stack(head=(Block(mixers=(ENGRAM, DENSE)),), hyper_connections=MANIFOLD)


def lm(stack: Stack) -> LMConfig:
    return LMConfig(d_model=D, vocab_size=32, stack=stack)


@functools.cache
def rows():
    return packed_rows(np.random.default_rng(0), rows=2, length=40, num_ids=32)


@functools.cache
def logits(config: LMConfig) -> np.ndarray:
    run = lambda model, ctx: model.logits(model(ctx, dtype=jnp.dtype("float32"), remat=Remat())[0])  # noqa: E731
    return np.asarray(jax.jit(run)(initialize(config.build(), 0), context_of(rows(), Rules(None), train=True)))


def plain_sinkhorn(matrix: np.ndarray, iterations: int) -> np.ndarray:
    matrix = np.exp(np.asarray(matrix, np.float64))
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-2, keepdims=True)
        matrix = matrix / matrix.sum(-1, keepdims=True)
    return matrix


def test_sinkhorn_knopp_makes_doubly_stochastic_matrices():
    given = np.random.default_rng(0).standard_normal((50, 4, 4)).astype(np.float32)
    run = jax.jit(doubly_stochastic, static_argnums=1)
    assert_close(run(given, 20), plain_sinkhorn(given, 20), max_rel=1e-6)
    found = np.asarray(run(given, 20))
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(found.sum(-2), 1, atol=1e-4)
    assert np.abs(np.asarray(run(given, 1)).sum(-2) - 1).max() > 0.05
    extreme = np.array([[[0, -200.0], [-300, -500]], [[90, 90], [-90, -90]]], np.float32)
    slope = jax.jit(jax.grad(lambda logits: (doubly_stochastic(logits, 20) ** 2).sum()))(extreme)
    assert np.isfinite(run(extreme, 20)).all()
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(run(extreme, 20)[1], 0.5)


def plain_coefficients(connection, x):
    """(pre, post, residual) by the papers' formulas, in float64."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(connection)}
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    if connection.config.kind == "manifold":
        flat = x.reshape(*x.shape[:2], -1)
        flat = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-6)
        parts = [slice(0, M), slice(M, 2 * M), slice(2 * M, None)]
        pre, post, residual = (g * (flat @ p["projection"][:, s]) + p["bias"][s] for g, s in zip(p["gates"], parts, strict=True))
        return sigmoid(pre), 2 * sigmoid(post), plain_sinkhorn(residual.reshape(*residual.shape[:2], M, M), 20)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    read, write = p["gates"]
    pre = read * np.tanh(normed @ p["projection"][:, 0]) + p["pre"]
    post = write * np.tanh(normed @ p["projection"][:, 1]) + p["post"]
    residual = np.stack([read * np.tanh(normed[:, :, m] @ p["projection"][:, 2:]) for m in range(M)], -1) + p["residual"]
    return pre, post, residual


@pytest.mark.parametrize("config", [MANIFOLD, FREE], ids=["manifold", "free"])
def test_values_match_the_equations(config):
    connection = lively(initialize(config.build(D, Place(1)), 0), 1, std=0.5)
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 5, M, D)), rng.standard_normal((2, 5, D))
    pre, post, residual = plain_coefficients(connection, x)

    @jax.jit
    def run(connection, x, y):
        mixing: Mixing = connection(x)
        return dataclasses.astuple(mixing), mixing.read(x), mixing.write(x, y)

    with jax.default_matmul_precision("highest"):
        found, read, written = run(connection, x.astype(np.float32), y.astype(np.float32))
    for got, want in zip(found, (pre, post, residual), strict=True):
        assert_close(got, want, max_rel=2e-6)
    assert_close(read, np.einsum("btm,btmd->btd", pre, x), max_rel=2e-6)
    assert_close(written, np.einsum("btij,btjd->btid", residual, x) + post[..., None] * y[:, :, None], max_rel=2e-6)
    _, *narrow = run(connection, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16))
    for got, want in zip(narrow, (read, written), strict=True):
        assert got.dtype == jnp.bfloat16
        assert_close(got, want, max_rel=1e-2)


@pytest.mark.parametrize("config", [MANIFOLD.replace(gate=0.0), FREE], ids=["manifold", "free"])
def test_a_fresh_model_is_that_of_one_stream(config):
    """Equal streams stay equal, so several compute what one does; the sum of M equal streams differs by the norm's eps."""
    single, several = (logits(lm(PLAIN.replace(hyper_connections=streams))) for streams in (None, config))
    np.testing.assert_allclose(several, single, rtol=0, atol=2e-4 * np.abs(single).max())


def test_names_of_one_stream_stay_and_several_add_to_them():
    one, more = (dict(named_leaves(lm(PLAIN.replace(hyper_connections=own)).build())) for own in (None, MANIFOLD))
    added = {name.split(".connection.")[0] for name in more if ".connection." in name}
    assert added == {"stack.head.0.sub_layers.0", "stack.period.0.sub_layers.0", "stack.period.0.sub_layers.1"}
    collapse = {name for name in more if name.startswith("stack.collapse.")}
    assert {name for name in more if ".connection." not in name} - collapse == set(one)


def test_free_reads_the_stream_of_the_layer_s_number():
    model = initialize(lm(PLAIN.replace(hyper_connections=FREE)).build(), 0)
    head, (attention, dense) = model.stack.head[0].sub_layers[0], model.stack.period[0].sub_layers
    np.testing.assert_array_equal(head.connection.pre[...], [1, 0, 0])
    np.testing.assert_array_equal(attention.connection.pre[...], [[0, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(dense.connection.pre[...], [[0, 0, 1], [0, 1, 0]])


@functools.cache
def subject() -> Subject:
    return Subject(lively(initialize(lm(MIXED).build(), 0), 1), Rules(None), Remat(), num_ids=32, length=40)


@pytest.mark.parametrize("proof", [isolation, alone, decode])
def test_proofs_hold(proof):
    result = proof(subject(), 0)
    assert result.passed, result.facts


def test_a_mesh_computes_what_one_device_does(request):
    config = load_config(request.config.rootpath / "configs/families/engram.py").replace(model=lm(SHALLOW))
    layout = Layout(fsdp=2, context=2, tensor=2)
    batch = packed_rows(np.random.default_rng(0), rows=2, length=48, num_ids=32)
    single, other = (MeshStep(config, which, batch, quick=True) for which in (Layout(), layout))
    for name, (error, bound) in compare(single, other).items():
        assert error <= bound, f"{name}: {error:.1e}, bound {bound:.1e}"
    assert other()[0]["train/loss"] == pytest.approx(single()[0]["train/loss"], rel=1e-5)


def test_counts():
    configs = [lm(MIXED.replace(hyper_connections=own)) for own in (MANIFOLD, FREE)]
    found = [count(config, config.build(), 64) for config in configs]
    connected, wide = 2 + 2 * 2, M * M + 2 * M
    extra = [connected * (M * D * wide + 3 + wide) + M * D * M + 1 + M, connected * (D * (M + 2) + 2 + 2 * M + M * M)]
    assert found[0].params - found[1].params == extra[0] - extra[1]
    mixers = sum(mixer.flops_per_token(D, 64) for mixer in MIXED.mixers()) + 2 * D * 32
    # Coefficients, a read of M numbers a channel, a mixture and a write of M * (M + 1).
    assert found[0].flops_per_token - mixers == connected * 2 * D * wide * (M + 1) + 2 * D * M * (M + 1)
    # Each stream makes M + 2 numbers on its own, from D values; at the end they are summed.
    assert found[1].flops_per_token - mixers == connected * 2 * D * (M * (M + 2) + wide) + D * M


def test_refusals():
    problems = lambda stack: [(p.path, p.value) for p in collect_problems(stack)]  # noqa: E731
    assert problems(MIXED) == []
    assert problems(MIXED.replace(hyper_connections=None)) == [("head[0].mixers[0].branches", M)]
    assert problems(MIXED.replace(hyper_connections=HyperConnections(streams=2))) == [("head[0].mixers[0].branches", M)]
    inside = PLAIN.replace(head=(Block(mixers=(Parallel(mixers=(ATTENTION, ATTENTION)),)),), hyper_connections=MANIFOLD)
    assert problems(inside) == []
    assert problems(PLAIN.replace(hyper_connections=HyperConnections(streams=1))) == [("hyper_connections.streams", 1)]
    _, unlike = matched_layers(lm(PLAIN.replace(hyper_connections=MANIFOLD)), lm(PLAIN))
    assert "stack.hyper_connections" in [problem.path for problem in unlike]
    with pytest.raises(UserError, match=r"3 residual streams \(stack\.hyper_connections\)"):
        write_config(lm(PLAIN.replace(hyper_connections=MANIFOLD)))
