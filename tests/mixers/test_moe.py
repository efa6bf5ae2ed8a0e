"""Mixture of experts: routing, dispatch, losses, biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from mlt_kernels.testing import assert_close, assert_same_bits, check_isolation, positions, segment_ids

from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.nn.param import initialize
from mlt.parallel.rules import Rules

D = 16
INFO = BuildInfo(d_model=D, num_sub_layers=4, vocab_size=64)
MESH_AXES = ("replica", "fsdp", "context", "tensor", "expert")

CONFIGS = {
    "sigmoid": MoE(
        num_experts=8,
        num_experts_per_token=3,
        d_ff=8,
        num_shared_experts=2,
        routed_scale=2.5,
        num_groups=4,
        groups_per_token=2,
        balance_loss=1e-4,
        z_loss=1e-2,
    ),
    "softmax": MoE(
        num_experts=5,
        num_experts_per_token=2,
        d_ff=8,
        router="softmax",
        renormalize=False,
        balance_loss=0.1,
        global_balance_loss=0.2,
    ),
}
CHUNKS = MoE(
    num_experts=8,
    num_experts_per_token=2,
    d_ff=8,
    num_groups=4,
    groups_per_token=2,
    balance_loss=1e-2,
    global_balance_loss=1e-2,
    z_loss=1e-2,
    chunk_len=5,
    capacity_factor=0.8,
)


def described(config, seed, d_model=D):
    return initialize(config.build(BuildInfo(d_model=d_model, num_sub_layers=4, vocab_size=64)), seed)


def made(config, seed=0):
    mixer = described(config, seed)
    if mixer.router_bias is not None:
        bias = 0.3 * np.random.default_rng(seed).standard_normal(config.num_experts).astype(np.float32)
        mixer.router_bias = mixer.router_bias.replace(jnp.asarray(bias))
    return mixer


def inputs(batch=4, length=22, seed=0, padding=True, dtype=jnp.float32):
    segments = segment_ids(seed, batch, length, padding=padding)
    x = np.random.default_rng(seed).standard_normal((batch, length, D)).astype(np.float32)
    return jnp.asarray(x, dtype), context(segments)


def context(segments, rules=None, train=True):
    segments = np.asarray(segments, np.int32)
    ids = jnp.zeros(segments.shape, jnp.int32)
    return Context(ids, jnp.asarray(segments), jnp.asarray(positions(segments)), rules or Rules(), train)


def whole(config):
    """The config without what couples documents."""
    return config.replace(balance_loss=0.0, global_balance_loss=0.0, z_loss=0.0)


def plain_scores(mixer, x):
    logits = x @ mixer.router[...]
    return logits, jax.nn.sigmoid(logits) if mixer.config.router == "sigmoid" else jax.nn.softmax(logits)


def plain_choice(mixer, x, is_token):
    """(B, T, E) bool by sorting, token by token."""
    config = mixer.config
    ranked = np.array(plain_scores(mixer, x)[1])
    ranked += 0.0 if mixer.router_bias is None else np.asarray(mixer.router_bias[...])
    chosen = np.zeros(ranked.shape, bool)
    for at in np.ndindex(ranked.shape[:-1]):
        groups = ranked[at].reshape(config.num_groups, -1)
        worth = np.sort(groups, axis=-1)[:, -2:].sum(-1)
        groups[np.argsort(-worth)[config.groups_per_token :]] = -np.inf
        chosen[(*at, np.argsort(-ranked[at])[: config.num_experts_per_token])] = is_token[at]
    return chosen


def plain(mixer, x, chosen, is_token):
    """Every expert on every token, in the arguments' precision: y, zero at padding, and the sum of the losses."""
    config = mixer.config
    logits, scores = plain_scores(mixer, x)
    weights = jnp.where(chosen, scores, 0.0)
    if config.renormalize:
        weights = weights / jnp.where(is_token[..., None], weights.sum(-1, keepdims=True), 1.0)
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, mixer.gate[...])) * jnp.einsum("btd,edf->btef", x, mixer.up[...])
    y = jnp.einsum("bte,btef,efd->btd", weights * config.routed_scale, hidden, mixer.down[...])
    if mixer.shared is not None:
        gate, up, down = (getattr(mixer.shared, name).kernel[...] for name in ("gate", "up", "down"))
        y = y + (jax.nn.silu(x @ gate) * (x @ up)) @ down
    loss = 0.0
    for row in range(x.shape[0]):
        real = is_token[row]
        used = chosen[row][real].mean(0) * config.num_experts / config.num_experts_per_token
        share = (scores[row][real] / scores[row][real].sum(-1, keepdims=True)).mean(0)
        square = (jax.nn.logsumexp(logits[row][real], axis=-1) ** 2).mean()
        loss = loss + (config.balance_loss * (used * share).sum() + config.z_loss * square) / x.shape[0]
    used = chosen[is_token].mean(0) * config.num_experts / config.num_experts_per_token
    share = (scores[is_token] / scores[is_token].sum(-1, keepdims=True)).mean(0)
    loss = loss + config.global_balance_loss * (used * share).sum()
    return jnp.where(is_token[..., None], y, 0.0), loss


def losses(aux):
    return sum(value for name, value in aux.items() if name.startswith("loss/"))


def total(mixer, x, ctx):
    """A scalar of outputs and losses, and its parts."""
    y, aux = mixer(x, ctx)
    y = jnp.where(ctx.is_token[..., None], y, 0.0)
    return (y.astype(jnp.float32) ** 2).sum() + losses(aux), (y, aux)


run = jax.jit(lambda mixer, x, ctx: mixer(x, ctx))
run_gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
updated = jax.jit(lambda mixer, aux: mixer.updated(aux))


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_match_every_expert_on_every_token(name):
    mixer = made(CONFIGS[name])
    x, ctx = inputs()
    is_token = np.asarray(ctx.is_token)

    def dense(mixer, x):
        y, loss = plain(mixer, x, chosen, is_token)
        return (y**2).sum() + loss, (y, loss)

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (mixer, x))
        chosen = plain_choice(*exact, is_token)
        (grad_mixer, grad_x), (y, loss) = jax.tree.map(np.asarray, jax.jit(jax.grad(dense, (0, 1), has_aux=True))(*exact))
    (_, (got_y, got_aux)), (got_mixer, got_x) = run_gradients(mixer, x, ctx)
    assert_close(got_y, y, max_rel=2e-6)
    assert_close(losses(got_aux), loss, max_rel=2e-6)
    np.testing.assert_array_equal(got_aux["count/load"], chosen.sum((0, 1)))
    assert_close(got_x, grad_x, max_rel=2e-6)
    for (path, want), got in zip(jax.tree.leaves_with_path(grad_mixer), jax.tree.leaves(got_mixer), strict=True):
        assert_close(got, want, max_rel=5e-6, what=jax.tree_util.keystr(path))


def test_every_expert_at_once_is_their_weighted_sum():
    mixer = made(MoE(num_experts=3, num_experts_per_token=3, d_ff=8, router="softmax"))
    x, ctx = inputs(padding=False)
    router, gate, up, down = (np.asarray(getattr(mixer, name)[...], np.float64) for name in ("router", "gate", "up", "down"))
    scores = np.exp(np.asarray(x, np.float64) @ router)
    expected = 0.0
    for e in range(3):
        pre = np.asarray(x, np.float64) @ gate[e]
        expert = (pre / (1 + np.exp(-pre)) * (np.asarray(x, np.float64) @ up[e])) @ down[e]
        expected = expected + scores[..., e, None] / scores.sum(-1, keepdims=True) * expert
    assert_close(run(mixer, x, ctx)[0], expected, max_rel=2e-6)


def test_one_expert_is_a_dense_feed_forward():
    mixer = made(MoE(num_experts=1, num_experts_per_token=1, d_ff=24))
    dense = described(SwiGLU(d_ff=24), 0)
    for name in ("gate", "up", "down"):
        linear = getattr(dense, name)
        linear.kernel = linear.kernel.replace(getattr(mixer, name)[0])
    x, ctx = inputs(padding=False)
    assert_close(run(mixer, x, ctx)[0], run(dense, x, ctx)[0], max_rel=1e-6)


def test_token_order_does_not_matter():
    mixer = made(CONFIGS["sigmoid"])
    x, ctx = inputs(padding=False)
    order = np.random.default_rng(0).permutation(22)
    (y, aux), (shuffled, other) = run(mixer, x, ctx), run(mixer, x[:, order], ctx)
    assert_close(shuffled, y[:, order], max_rel=1e-6)
    assert_same_bits(other["count/load"], aux["count/load"])


@pytest.mark.parametrize(("name", "dtype"), [("sigmoid", jnp.float32), ("softmax", jnp.bfloat16)])
def test_documents_are_isolated_to_the_bit(name, dtype):
    mixer = made(whole(CONFIGS[name]))
    x, ctx = inputs(batch=2, length=40, seed=3, dtype=dtype)
    check_isolation(lambda x: mixer(x, ctx)[0], {"x": x}, np.asarray(ctx.segment_ids), token_arguments=("x",))


def test_padding_counts_nowhere():
    mixer = made(CONFIGS["sigmoid"])
    x, ctx = inputs(seed=1)
    assert not ctx.is_token.all()
    before, after = run_gradients(mixer, x, ctx), run_gradients(mixer, jnp.where(ctx.is_token[..., None], x, 50.0), ctx)
    assert_same_bits(after, before)
    (_, (_, aux)), _ = before
    assert int(aux["count/load"].sum()) == 3 * ctx.is_token.sum()


def test_rows_of_padding_alone():
    mixer = made(CONFIGS["sigmoid"])
    x, ctx = inputs()
    (_, (_, aux)), grads = run_gradients(mixer, x, context(np.zeros(ctx.segment_ids.shape)))
    aux.pop("metric/router_bias_range")
    assert {name: value.tolist() for name, value in aux.items()} == {
        "count/load": [0] * 8,
        "metric/router_logit": 0.0,
        "loss/balance": 0.0,
        "loss/z": 0.0,
    }
    assert_same_bits(grads, jax.tree.map(jnp.zeros_like, grads))


def test_no_tokens_at_all():
    mixer = made(CONFIGS["sigmoid"])
    assert run(mixer, jnp.zeros((2, 0, D)), context(np.zeros((2, 0))))[0].shape == (2, 0, D)


def steered(config, choice):
    """A mixer whose router sends token t to the experts `choice[t]` with equal scores and no score elsewhere."""
    mixer = described(config, 0, config.num_experts)
    mixer.router = mixer.router.replace(30.0 * jnp.eye(config.num_experts))
    x = -np.ones((1, len(choice), config.num_experts), np.float32)
    for t, experts in enumerate(choice):
        x[0, t, list(experts)] = 1.0
    return mixer, jnp.asarray(x), context(np.ones((1, len(choice))))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_balance_losses_are_one_when_even_and_experts_over_k_when_collapsed(router):
    losses = {"balance_loss": 0.5, "global_balance_loss": 0.25}
    config = MoE(num_experts=8, num_experts_per_token=2, d_ff=4, router=router, **losses)
    aux = run(*steered(config, [(t, (t + 1) % 8) for t in range(8)]))[1]
    assert float(aux["loss/balance"]) == pytest.approx(0.5, rel=1e-6)
    assert float(aux["loss/global_balance"]) == pytest.approx(0.25, rel=1e-6)
    np.testing.assert_array_equal(aux["count/load"], [2] * 8)
    aux = run(*steered(config, [(2, 5)] * 8))[1]
    assert float(aux["loss/balance"]) == pytest.approx(0.5 * 8 / 2, rel=1e-6)
    assert float(aux["loss/global_balance"]) == pytest.approx(0.25 * 8 / 2, rel=1e-6)
    np.testing.assert_array_equal(aux["count/load"], [0, 0, 8, 0, 0, 8, 0, 0])


def test_rows_that_specialize_are_balanced_as_a_batch_and_not_one_by_one():
    config = MoE(num_experts=4, num_experts_per_token=2, d_ff=4, router="softmax", balance_loss=1.0, global_balance_loss=1.0)
    mixer, x, _ = steered(config, [(0, 1)] * 4 + [(2, 3)] * 4)
    aux = run(mixer, x.reshape(2, 4, 4), context(np.ones((2, 4))))[1]
    assert float(aux["loss/balance"]) == pytest.approx(2.0, rel=1e-6)
    assert float(aux["loss/global_balance"]) == pytest.approx(1.0, rel=1e-6)


def test_bias_moves_by_exactly_the_rate_towards_an_even_load():
    config = MoE(num_experts=4, num_experts_per_token=1, d_ff=4, bias_update_rate=0.25)
    mixer, x, ctx = steered(config, [(0,)] * 5 + [(1,)] * 2 + [(2,)] * 1)
    moved = updated(mixer, run(mixer, x, ctx)[1])
    np.testing.assert_array_equal(moved.router_bias[...], [-0.25, 0.0, 0.25, 0.25])
    np.testing.assert_array_equal(mixer.router_bias[...], [0.0] * 4)
    assert jax.tree.structure(moved) == jax.tree.structure(mixer)


def test_bias_steers_the_choice_and_not_the_weights():
    mixer = made(CONFIGS["sigmoid"])
    x, ctx = inputs()
    favoured = jnp.zeros(8).at[jnp.array([1, 4, 5])].set(9.0)
    mixer.router_bias = mixer.router_bias.replace(favoured)
    scores, experts, weights = jax.jit(lambda m, x: (s := m.scores(m.logits(x)), *m.choose(s, Rules())))(mixer, x)
    np.testing.assert_array_equal(np.sort(experts, axis=-1), np.broadcast_to([1, 4, 5], experts.shape))
    chosen = np.take_along_axis(np.asarray(scores), np.asarray(experts), axis=-1)
    assert_close(weights, 2.5 * chosen / chosen.sum(-1, keepdims=True), max_rel=1e-6)
    _, (grad, _) = run_gradients(mixer, x, ctx)
    np.testing.assert_array_equal(grad.router_bias[...], np.zeros(8))


def test_micro_batches_report_what_one_batch_does():
    mixer = made(CONFIGS["sigmoid"])
    x, ctx = inputs()
    complete = run(mixer, x, ctx)[1]
    parts = [run(mixer, x[i : i + 1], context(ctx.segment_ids[i : i + 1]))[1] for i in range(4)]
    summed = {name: sum(part[name] for part in parts) for name in complete}
    assert_same_bits(updated(mixer, summed).router_bias[...], updated(mixer, complete).router_bias[...])
    for name in ("loss/balance", "loss/z", "metric/router_logit", "metric/router_bias_range"):
        assert_close(summed[name] / 4, complete[name], max_rel=1e-6)


def test_update_of_scanned_layers_is_each_layer_s_own():
    mixers = [made(CONFIGS["sigmoid"], seed) for seed in (0, 7)]
    loads = [{"count/load": jnp.array(load)} for load in ([9, 1, 1, 1, 0, 0, 0, 0], [0, 2, 2, 2, 2, 4, 2, 2])]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *mixers)
    together = jax.vmap(lambda mixer, aux: mixer.updated(aux))(stack, jax.tree.map(lambda *leaves: jnp.stack(leaves), *loads))
    alone = [updated(mixer, load).router_bias[...] for mixer, load in zip(mixers, loads, strict=True)]
    assert_same_bits(together.router_bias[...], jnp.stack(alone))


def test_bfloat16_routes_in_float32():
    mixer = made(CONFIGS["sigmoid"])
    x, ctx = inputs(dtype=jnp.bfloat16)
    y, aux = run(mixer, x, ctx)
    exact, exact_aux = run(mixer, x.astype(jnp.float32), ctx)
    assert y.dtype == jnp.bfloat16
    assert_same_bits(aux, exact_aux)
    real = np.asarray(ctx.is_token)
    assert_close(np.asarray(y, np.float32)[real], np.asarray(exact)[real], max_rel=2e-2)


def test_evaluation_reports_nothing():
    mixer = made(CONFIGS["sigmoid"])
    x, ctx = inputs()
    y, aux = run(mixer, x, context(ctx.segment_ids, train=False))
    assert aux == {}
    assert_same_bits(y, run(mixer, x, ctx)[0])


def test_the_first_token_of_a_chunk_chooses_for_all_of_it():
    config = whole(CHUNKS).replace(capacity_factor=None)
    mixer = made(config)
    x, ctx = inputs()
    choose = jax.jit(lambda mixer, logits: mixer.choose(mixer.scores(logits), Rules()))
    by_token, by_chunk = made(config.replace(chunk_len=None)), mixer
    heads = np.arange(22) - np.asarray(ctx.positions) % 5
    experts, weights = choose(mixer, jnp.take_along_axis(by_token.logits(x), jnp.asarray(heads)[..., None], axis=1))
    chosen = (experts[..., None] == np.arange(8)).any(-2)
    y, aux = run(by_chunk, x, ctx)
    np.testing.assert_array_equal(aux["count/load"], np.asarray(chosen)[np.asarray(ctx.is_token)].sum(0))
    dense = jax.nn.silu(jnp.einsum("btd,edf->btef", x, mixer.gate[...])) * jnp.einsum("btd,edf->btef", x, mixer.up[...])
    dense = jnp.einsum("btef,efd->bted", dense, mixer.down[...])
    want = (jnp.take_along_axis(dense, experts[..., None], axis=2) * weights[..., None]).sum(2)
    assert_close(jnp.where(ctx.is_token[..., None], y, 0), jnp.where(ctx.is_token[..., None], want, 0), max_rel=2e-6)


def test_chunks_do_not_leak():
    """Documents are isolated to the bit, gradients included, and no output or gradient of one knows a later token."""
    config = whole(CHUNKS).replace(capacity_factor=None)
    mixer = made(config)
    x, ctx = inputs(batch=2, length=40, seed=3)
    check_isolation(lambda x: mixer(x, ctx)[0], {"x": x}, np.asarray(ctx.segment_ids), token_arguments=("x",))
    one = context(np.ones((2, 40)))
    y = run(mixer, x, one)[0]
    for cut in (1, 5, 18, 39):
        later = jnp.where((jnp.arange(40) < cut)[:, None], x, 7.0 - x)
        assert_same_bits(run(mixer, later, one)[0][:, :cut], y[:, :cut])
    assert config.left_context == 4
    far = jnp.where((jnp.arange(40) >= 30)[:, None], x, 7.0 - x)
    assert_same_bits(run(mixer, far, one)[0][:, 34:], y[:, 34:])


def test_chunks_decode_as_the_full_pass():
    config = whole(CHUNKS).replace(capacity_factor=None)
    mixer = made(config)
    x, ctx = inputs()
    y = run(mixer, x, context(ctx.segment_ids, train=False))[0]

    @jax.jit
    def stepwise(x, segment_ids, positions):
        def part(lo, hi):
            ids = jnp.zeros((4, hi - lo), jnp.int32)
            return x[:, lo:hi], Context(ids, segment_ids[:, lo:hi], positions[:, lo:hi], Rules(), False)

        state, found, at = mixer.init_state(4, 22, jnp.float32), [], 0
        for size in (7, 1, 1, 2, 11):
            tokens, ctx = part(at, at + size)
            out, state = mixer.step(tokens, state, ctx)
            found.append(out)
            at += size
        return jnp.concatenate(found, axis=1)

    real = np.asarray(ctx.is_token)
    assert_close(np.asarray(stepwise(x, ctx.segment_ids, ctx.positions))[real], np.asarray(y)[real], max_rel=1e-6)
    kept = sum(leaf[0].size for leaf in jax.tree.leaves(mixer.init_state(4, 22, jnp.float32)))
    assert kept == config.state_size(D, 22)


def test_capacity_drops_what_comes_later_in_the_row_and_counts_it():
    """12 tokens, one expert each, room for 12 * 0.5 / 4 -> 2 tokens an expert."""
    config = MoE(num_experts=4, num_experts_per_token=1, d_ff=4, capacity_factor=0.5)
    mixer, x, ctx = steered(config, [(0,)] * 5 + [(1,), (0,), (2,), (2,), (2,), (0,), (3,)])
    (y, aux), (free, _) = run(mixer, x, ctx), run(mixer, x, context(ctx.segment_ids, train=False))
    kept = np.isin(np.arange(12), [0, 1, 5, 7, 8, 11])
    assert int(aux["count/dropped"]) == 6
    np.testing.assert_array_equal(aux["count/load"], [7, 1, 3, 1])
    assert_same_bits(y[:, kept], free[:, kept])
    assert not np.asarray(y)[:, ~kept].any()
    assert np.asarray(free).any(-1).all()


def test_a_mesh_computes_the_same():
    """Chunks and rows cross shards, experts have owners, rows of an owner meet a capacity, a balance is the whole batch's."""
    mesh = jax.make_mesh((1, 1, 2, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 5)
    mixer = made(CHUNKS)
    x, ctx = inputs()
    rules = Rules(mesh)
    expected = run_gradients(mixer, x, ctx)
    spread_mixer = jax.device_put(mixer, rules.param_shardings(CHUNKS.build(INFO)))
    spread_x = jax.device_put(x, rules.sharding(("batch", "seq", "stream")))
    got = run_gradients(spread_mixer, spread_x, context(ctx.segment_ids, rules))
    assert_close(jax.tree.leaves(got), jax.tree.leaves(expected), max_rel=5e-6)
    (_, (_, aux)), _ = expected
    assert 0 < int(aux["count/dropped"]) < int(aux["count/load"].sum())


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts_per_token": 9}, "num_experts_per_token"),
        ({"num_shared_experts": -1}, "num_shared_experts"),
        ({"z_loss": -0.1}, "z_loss"),
        ({"global_balance_loss": -1.0}, "global_balance_loss"),
        ({"chunk_len": 1}, "chunk_len"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"router": "softmax", "bias_update_rate": 0.1}, "bias_update_rate"),
        ({"num_groups": 3}, "num_groups"),
        ({"num_groups": 8}, "num_groups"),
        ({"num_groups": 2, "groups_per_token": 3}, "groups_per_token"),
        ({"num_groups": 4, "groups_per_token": 1, "num_experts_per_token": 3}, "num_experts_per_token"),
    ],
)
def test_problems(fields, path):
    config = MoE(**{"num_experts": 8, "num_experts_per_token": 2, "d_ff": 8, **fields})
    assert [problem.path for problem in config.problems()] == [path]


def test_good_configs_have_no_problems():
    assert not [problem for config in (*CONFIGS.values(), CHUNKS) for problem in config.problems()]
