"""Routers in a run: their metrics, their biases in checkpoints, expert counts that no mesh can hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mlt_kernels.testing import assert_same_bits

from mlt.checkpoint.save import Checkpointer
from mlt.config.check import cross_section_problems
from mlt.config.load import load_config
from mlt.loss import context_of
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.parallel import Parallel
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import merge, named_leaves, partition
from mlt.optim.adamw import AdamW
from mlt.optim.schedule import WarmupCosine
from mlt.parallel.mesh import Layout
from mlt.train.router_load import load_metrics
from mlt.train.state import abstract_state, create_state
from mlt.train.step import StepOptions, train_step
from mlt.verify.material import packed_rows

EXPERTS = MoE(num_experts=4, num_experts_per_token=2, d_ff=8, bias_update_rate=0.1, capacity_factor=0.5)


def test_load_metrics_are_of_the_step_and_named_by_layer():
    side_by_side = Parallel(mixers=(Attention(num_heads=1, head_dim=8), EXPERTS))
    period = (Block(mixers=(Attention(num_heads=1, head_dim=8), EXPERTS)), Block(mixers=(SwiGLU(d_ff=8),)))
    stack = Stack(head=(Block(mixers=(side_by_side,)),), period=period, repeats=2)
    loads = jnp.array([[8, 0, 0, 0], [3, 1, 3, 1]])
    aux = {
        "head": [[{"count/load/1": jnp.array([2, 2, 2, 2]), "count/dropped/1": jnp.array(4), "metric/x/1": jnp.array(7.0)}]],
        "period": [[{}, {"count/load": loads, "count/dropped": jnp.array([0, 2])}], [{}]],
        **{part: [] for part in ("middle", "upper", "tail")},
    }
    found = {name: float(value) for name, value in load_metrics(stack, aux).items()}
    half = -(2 * 0.375 * np.log2(0.375) + 2 * 0.125 * np.log2(0.125)) / 2
    assert found == pytest.approx(
        {
            "router/layers.0.sub_layers.0.mixers.1/max_violation": 0.0,
            "router/layers.1.sub_layers.1/max_violation": 3.0,
            "router/layers.3.sub_layers.1/max_violation": 0.5,
            "aux/max_violation": 3.5 / 3,
            "aux/load_entropy": (1.0 + 0.0 + half) / 3,
            "aux/dropped_share": 6 / 24,
        }
    )
    assert load_metrics(Stack(period=period[1:]), {"period": [[{}]]}) == {}
    nothing = {"period": [[{}, {"count/load": jnp.zeros((1, 4), jnp.int32)}], [{}]]}
    assert float(load_metrics(Stack(period=period), nothing)["aux/max_violation"]) == 0.0


def test_load_metrics_of_batches_whose_products_need_more_than_32_bits():
    stack = Stack(period=(Block(mixers=(EXPERTS,)),), repeats=4)
    loads = jnp.tile(jnp.array([600_000_000, 0, 0, 0], jnp.int32), (4, 1))
    aux = {"period": [[{"count/load": loads, "count/dropped": jnp.full(4, 300_000_000, jnp.int32)}]]}
    found = load_metrics(stack, aux)
    assert float(found["aux/max_violation"]) == pytest.approx(3.0)
    assert float(found["aux/dropped_share"]) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def run():
    """(specs, optimizer, compiled step, states): a small model's state before and after each of two steps."""
    block = Block(mixers=(Attention(num_heads=2, head_dim=4), EXPERTS))
    specs = LMConfig(d_model=8, vocab_size=16, stack=Stack(period=(block,), repeats=2)).build(None)
    optimizer = AdamW(learning_rate=1e-2).transformation(partition(specs)[0], WarmupCosine(warmup_steps=1), 10)
    rules = Layout().rules(jax.devices()[:1])
    options = StepOptions(rules=rules, remat=Remat(mode="none"), dtype=jnp.dtype("float32"))
    batch = packed_rows(np.random.default_rng(0), rows=2, length=24, num_ids=16)
    step = functools.partial(train_step, batch=batch, optimizer=optimizer, options=options)
    first = create_state(specs, optimizer, rules, 0)
    compiled = jax.jit(step).lower(first).compile()
    second, metrics = compiled(first)
    return specs, optimizer, compiled, (first, second, compiled(second)[0]), metrics


def bias(state):
    return np.asarray(state.model.stack.period[0].sub_layers[1].mixer.router_bias[...])


def test_a_step_moves_biases_and_reports_the_router(run):
    *_, (first, second, third), metrics = run
    assert not bias(first).any()
    assert set(np.abs(bias(second)).ravel()) <= {np.float32(0), np.float32(0.1)}
    assert bias(second).any()
    assert not np.array_equal(bias(second), bias(third))
    assert {name for name in metrics if name.startswith(("aux/", "router/"))} == {
        *(f"aux/{name}" for name in ("max_violation", "load_entropy", "dropped_share", "router_logit", "router_bias_range")),
        *(f"router/layers.{layer}.sub_layers.1/max_violation" for layer in (0, 1)),
    }
    assert 0 < metrics["aux/dropped_share"] < 1
    assert 0 < metrics["aux/load_entropy"] < 1


@pytest.mark.parametrize("layout", [Layout(), Layout(expert=2, replica=2)], ids=["same mesh", "other mesh"])
def test_biases_are_saved_and_restored_to_the_bit(run, tmp_path, layout):
    specs, optimizer, step, (_, second, third), _ = run
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, second, data={}, meta={})
        checkpoints.wait()
        rules = layout.rules(jax.devices()[: layout.num_devices])
        found = checkpoints.restore(abstract_state(specs, optimizer, rules)).state
    assert_same_bits(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, second))
    assert bias(found).any()
    if layout == Layout():
        assert_same_bits(step(found)[0], third)


def test_the_global_balance_loss_counts_on_over_micro_batches():
    """Its gradient against the loss written out: a micro-batch's shares, times the experts' use up to it."""
    count, experts = 2, MoE(num_experts=4, num_experts_per_token=2, d_ff=8, global_balance_loss=0.5)
    specs = LMConfig(d_model=8, vocab_size=16, stack=Stack(period=(Block(mixers=(experts,)),), repeats=2)).build(None)
    rules, dtype = Layout().rules(jax.devices()[:1]), jnp.dtype("float32")
    options = StepOptions(rules=rules, remat=Remat(mode="none"), dtype=dtype, grad_accumulation=count, clip_norm=None)
    batch = packed_rows(np.random.default_rng(0), rows=2 * count, length=24, num_ids=16)
    batch["weights"] = np.zeros_like(batch["weights"])  # the balance loss alone

    def written_out(trained, buffers):
        model, used, balance = merge(trained, buffers), [0.0, 0.0], [0.0, 0.0]
        (period,) = model.stack.period
        for first in range(count):
            micro = {name: jnp.asarray(values[first::count]) for name, values in batch.items()}
            ctx = context_of(micro, rules, train=True)
            x_BTD = model.embed.table[...][micro["tokens"]]
            for depth in range(2):
                (layer,) = jax.tree.map(lambda x, depth=depth: x[depth], period).sub_layers
                normed_BTD = layer.norm(x_BTD)
                scores_BTE = jax.nn.sigmoid(normed_BTD @ layer.mixer.router[...])
                chosen = jax.nn.one_hot(jax.lax.top_k(scores_BTE, 2)[1], 4).sum(-2) * ctx.is_token[..., None]
                used[depth] += chosen.sum((0, 1))
                shares_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True) * ctx.is_token[..., None]
                share_E = shares_BTE.sum((0, 1)) / ctx.is_token.sum()
                balance[depth] += 0.5 * jnp.sum(used[depth] / used[depth].sum() * 4 * share_E) / count
                x_BTD = x_BTD + layer.mixer(normed_BTD, ctx)[0]
        return sum(balance)

    state = create_state(specs, optax.sgd(1.0), rules, 0)
    trained, buffers = partition(state.model)
    fast = jax.jit
    balance, wanted = fast(jax.value_and_grad(written_out))(trained, buffers)
    new, metrics = fast(functools.partial(train_step, optimizer=optax.sgd(1.0), options=options))(state, batch)
    assert float(metrics["aux/global_balance"]) == pytest.approx(float(balance) / 2, rel=1e-5)
    assert jax.tree.structure(new.model) == jax.tree.structure(state.model)
    for (name, want), (_, old), (_, left) in zip(*map(named_leaves, (wanted, trained, partition(new.model)[0])), strict=True):
        np.testing.assert_allclose(old - left, want, atol=1e-6, rtol=1e-5, err_msg=name)
    assert float(jnp.abs(wanted.stack.period[0].sub_layers[0].mixer.router[...]).max()) > 1e-3


def test_mixers_side_by_side_count_on_each_by_itself():
    loads, experts = [jnp.arange(4), jnp.arange(4) + 4], EXPERTS.replace(global_balance_loss=0.1)
    both, info = Parallel(mixers=(experts, SwiGLU(d_ff=8), experts, EXPERTS)), Parallel.example()[1]
    aux = {"count/load/0": loads[0], "count/load/2": loads[1], "count/load/3": loads[0], "metric/router_logit/2": jnp.zeros(())}
    counting = both.build(info).within_step(aux).mixers
    assert [counting[place].load_before[...].tolist() for place in (0, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert counting[3].load_before is None


@pytest.mark.parametrize("shards", [3, 16])
def test_experts_that_do_not_divide_are_refused_before_anything_is_made(request, shards):
    config = load_config(request.config.rootpath / "configs/quickstart.py", sets=[f"mesh.expert={shards}"], check=False)
    found = {problem.path: f"{problem.rule}; {problem.ways_out}" for problem in cross_section_problems(config)}
    assert "does not divide experts of 8 (stack.period.0.sub_layers.1.mixer.down and 2 more); use 1, 2, 4" in found["mesh.expert"]
