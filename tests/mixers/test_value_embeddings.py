"""LaVE and MoVE against their equations, token by token in float64; their tables' gradients, whole and by rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.config.problems import collect_problems
from mlt.errors import UserError
from mlt.export.huggingface.registry import write_config
from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.value_embeddings import LaVEAttention, MoVEAttention, dealt_rows
from mlt.model.block import Block
from mlt.model.count import count
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import initialize, named_leaves, path_name
from mlt.optim.table import named
from mlt.parallel.rules import Rules
from mlt.train import sparse
from mlt.verify.material import lively, packed_rows

V, D = 24, 16
INFO = BuildInfo(d_model=D, num_sub_layers=4, vocab_size=V)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope_base": None}
LAVE = LaVEAttention(**HEADS, vocab_size=V, gate_channels=5, gate_row_channels=3)
MOVE = MoVEAttention(**HEADS, vocab_size=V, num_slots=3)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(config, seed: int = 1):
    return lively(initialize(config.build(INFO), 0), seed, std=0.3)


def weights_of(mixer) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(mixer)}


def given(seed: int = 0, rows: int = 2, length: int = 23):
    rng = np.random.default_rng(seed)
    batch = packed_rows(rng, rows=rows, length=length, num_ids=V)
    x = rng.standard_normal((rows, length, D)).astype(np.float32)
    return batch, x, Context(batch["tokens"], batch["segment_ids"], batch["positions"], Rules(None), False)


def place(token: int) -> int:
    """24 ids dealt out over gcd(24, 256) = 8 parts of three rows."""
    return token % 8 * 3 + token // 8


def lave_value(config, w, x, token):
    row = w["table"][place(token)].reshape(2, 6)
    own = np.tensordot(x, w["value.kernel"], 1)
    if config.gate_range is None:
        return own + row
    seen = np.concatenate([x[: config.gate_channels], row.reshape(-1)[: config.gate_row_channels]])
    return own + config.gate_range * sigmoid(seen @ w["value_gate.kernel"])[:, None] * row


def move_value(config, w, x, token):
    slots = w["table"][place(token)].reshape(3, 2, 6)
    gates = 2 * sigmoid(np.tensordot(x, w["value_gate.kernel"], 1))
    return gates[:, :1] * np.tensordot(x, w["value.kernel"], 1) + sum(gates[:, i + 1, None] * slots[i] for i in range(3))


def attended(w, x, batch, value) -> np.ndarray:
    """Softmax attention one query at a time; `value` of each token by itself."""
    y = np.zeros_like(x, np.float64)
    for row, t in np.ndindex(*x.shape[:2]):
        segment = batch["segment_ids"][row]
        seen = [s for s in range(t + 1) if segment[s] == segment[t] != 0]
        q = np.tensordot(x[row, t], w["query.kernel"], 1)
        k = [np.tensordot(x[row, s], w["key.kernel"], 1) for s in seen]
        v = [value(x[row, s], int(batch["tokens"][row, s])) for s in seen]
        for head in range(4 if seen else 0):
            scores = np.exp([q[head] @ key[head // 2] / np.sqrt(6) for key in k])
            mixed = sum(score * part[head // 2] for score, part in zip(scores / scores.sum(), v, strict=True))
            y[row, t] += mixed @ w["output.kernel"][head]
    return y


CASES = {
    "lave": (LAVE, lave_value),
    "lave without a gate": (LAVE.replace(gate_range=None), lave_value),
    "move": (MOVE, move_value),
}


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_equations(name):
    config, value = CASES[name]
    mixer = drawn(config)
    batch, x, ctx = given()
    found = np.asarray(jax.jit(lambda m, x: m(x, ctx)[0])(mixer, x))
    w = weights_of(mixer)
    want = attended(w, x.astype(np.float64), batch, functools.partial(value, config, w))
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(found[real], want[real], atol=2e-5)


@pytest.mark.parametrize("config", [LAVE, MOVE])
def test_an_empty_table_leaves_attention_as_it_is(config):
    """Before a row has moved off zero both are the attention they extend: the gate of MoVE's own values starts at one."""
    mixer, plain = drawn(config), initialize(Attention(**HEADS).build(INFO), 0)
    _, x, ctx = given(1)
    mixer.table[...] = jnp.zeros_like(mixer.table[...])
    mixer.value_gate.kernel[...] = jnp.zeros_like(mixer.value_gate.kernel[...])
    for name in ("query", "key", "value", "output"):
        setattr(plain, name, getattr(mixer, name))
    run = jax.jit(lambda m, x: m(x, ctx)[0])
    np.testing.assert_allclose(run(mixer, x), run(plain, x), atol=1e-6)


def test_readers_of_a_bank_add_up_in_its_gradient():
    """One bank for two layers: its gradient is the sum of those of two layers with equal banks of their own."""
    _, x, ctx = given(2)
    stack = lambda *mixers: Stack(head=tuple(Block(mixers=(mixer,)) for mixer in mixers)).build(INFO)  # noqa: E731
    apart = lively(initialize(stack(MOVE, MOVE), 0), 3)
    first, second = (f"head.{layer}.sub_layers.0.mixer.table" for layer in (0, 1))
    known = dict(named_leaves(apart))
    known[second] = known[first]

    def slopes(module):
        filled = jax.tree_util.tree_map_with_path(lambda path, _: known[path_name(path)], module)
        grad = jax.grad(lambda module: jnp.sum(jnp.sin(module(x, ctx, Remat(mode="none"))[0])))
        return {name: np.asarray(leaf) for name, leaf in named_leaves(jax.jit(grad)(filled))}

    one, two = slopes(stack(MOVE.replace(publish_bank="bank"), MOVE.replace(bank="bank"))), slopes(apart)
    np.testing.assert_allclose(one.pop(first), two.pop(first) + two.pop(second), atol=1e-5)
    assert one.keys() == two.keys()
    for name, grad in one.items():
        np.testing.assert_allclose(grad, two[name], atol=1e-5, err_msg=name)


def of_both() -> LMConfig:
    """A bank that is read in a scan, and scanned layers with tables of their own."""
    small = {"num_heads": 2, "head_dim": 4, "vocab_size": V}
    holder = MoVEAttention(**small, num_slots=2, publish_bank="bank", publish_values="first")
    reader = MoVEAttention(**small, num_slots=2, bank="bank")
    lave = LaVEAttention(**small, value_residual="first")
    head, period = ((Block(mixers=mixers),) for mixers in ((holder,), (reader, lave)))
    return LMConfig(d_model=D, vocab_size=V, stack=Stack(head=head, period=period, repeats=2), tie_embeddings=True)


def test_rows_by_records_are_the_dense_gradient():
    """Both tables may have optimizers by rows: the bank is looked up once, in front of the scan that reads it."""
    config, batch = of_both(), given(3)[0]
    trained = lively(initialize(config.build(), 0), 1)
    lazy = tuple(name for name, _ in named_leaves(trained) if name.endswith("mixer.table"))
    assert lazy == ("stack.head.0.sub_layers.0.mixer.table", "stack.period.0.sub_layers.1.mixer.table")

    def objective(trained, batch):
        ctx = Context(batch["tokens"], batch["segment_ids"], batch["positions"], Rules(None), True)
        hidden, aux = trained(ctx, dtype=jnp.dtype("float32"), remat=Remat(mode="none"))
        loss = jnp.sum(jnp.sin(hidden) * ctx.is_token[..., None])
        return loss, (loss, aux)

    @jax.jit
    def both(trained, batch):
        _, _, grads, records = sparse.gradient(objective, lazy)(trained, batch)
        merged = dict(named(sparse.with_rows(grads, records, trained, Rules(None))))
        return jax.grad(objective, has_aux=True)(trained, batch)[0], {name: merged[name].dense() for name in lazy}

    dense, rows = both(trained, batch)
    for name, grad in named_leaves(dense):
        assert np.asarray(grad).any(), name
    for name in lazy:
        want = dict(named_leaves(dense))[name]
        np.testing.assert_allclose(rows[name], want, atol=1e-5 * np.abs(want).max(), err_msg=name)


def test_every_id_has_a_row_and_neighbours_have_none_beside_each_other():
    for size in (24, 50_304, 97):
        rows = np.asarray(dealt_rows(np.arange(size), size))
        np.testing.assert_array_equal(np.sort(rows), np.arange(size))
    assert set(np.asarray(dealt_rows(np.arange(64), 50_304)) // (50_304 // 8)) == set(range(4))
    np.testing.assert_array_equal(dealt_rows(np.array([24, 31, -1]), 24), -1)


def test_counts_leave_out_the_rows_of_other_tokens():
    config = of_both()
    total = count(config, config.build(), 64)
    assert total.table_params == V * 16 + 2 * V * 8
    assert total.params - total.active_params == (V - 1) * 16 + 2 * (V - 1) * 8


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LAVE.replace(gate_channels=0, gate_row_channels=0), "reads nothing"),
        (LAVE.replace(gate_row_channels=13), "width of a row, 12"),
        (LAVE.replace(gate_range=-1.0), "must be positive"),
        (MOVE.replace(num_slots=0), "must be at least 1"),
        (MOVE.replace(bank="a", publish_bank="b"), "holds the bank"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, words):
    assert any(words in problem.rule for problem in config.problems())


def test_a_bank_of_other_sizes_is_refused():
    mixers = (MOVE.replace(publish_bank="bank"), MOVE.replace(bank="bank", num_slots=2))
    config = LMConfig(d_model=D, vocab_size=V, stack=Stack(head=tuple(Block(mixers=(mixer,)) for mixer in mixers)))
    (problem,) = collect_problems(config)
    assert (problem.path, problem.value) == ("stack.head[1].mixers[0]", "bank")
    assert "reads rows of 2 x 2 x 6, but head[0].mixers[0] publishes rows of 3 x 2 x 6" in problem.rule


@pytest.mark.parametrize("config", [LAVE, MOVE])
def test_no_architecture_of_others_takes_them_for_attention(config):
    stack = Stack(period=(Block(mixers=(config, SwiGLU(d_ff=16))),), repeats=2)
    with pytest.raises(UserError, match=f"llama: a layer is .'{type(config).__name__}', 'SwiGLU'., not with Attention"):
        write_config(LMConfig(d_model=D, vocab_size=V, stack=stack))


@pytest.mark.parametrize("config", [LAVE, MOVE])
def test_another_vocabulary_is_refused(config):
    with pytest.raises(UserError, match="vocab_size = 24 must be the model's vocab_size, 32"):
        config.build(BuildInfo(d_model=D, num_sub_layers=1, vocab_size=32))
    with pytest.raises(UserError, match="gate_channels = 17 must be at most d_model = 16"):
        LAVE.replace(gate_channels=17).build(INFO)
