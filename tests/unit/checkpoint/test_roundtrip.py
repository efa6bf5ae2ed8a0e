"""What is saved comes back to the bit, into the same tree or not at all."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.checkpoint.digest import _device_digest, digests
from mlt.checkpoint.layout import CheckpointError, committed_steps, read_leaves, read_meta
from mlt.checkpoint.restore import restore, restore_latest
from mlt.checkpoint.save import Checkpointer
from mlt.errors import UserError


class Moments(NamedTuple):
    mean: jax.Array
    nothing: None
    pair: tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    model: dict[str, Any]
    optimizer: Moments
    key: jax.Array


def make_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    model = {
        "blocks": [{"w": jnp.asarray(rng.normal(size=(33, 65)), jnp.bfloat16)} for _ in range(2)],
        "odd name/with.dots": jnp.asarray(rng.normal(size=7), jnp.float32),
        "special": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32),
        "empty": jnp.zeros((0, 3), jnp.float16),
        "flags": jnp.array([True, False, True]),
        "poles": jnp.array([1 + 2j, -3.5j], jnp.complex64),
        "codes": jnp.arange(256, dtype=jnp.uint8).reshape(16, 16),
        "scaled": jnp.array([1.0, -2.0], jnp.float8_e4m3fn),
    }
    moments = Moments(jnp.full((3, 3), seed + 0.1), None, (jnp.uint32(2**32 - 1), jnp.arange(5, dtype=jnp.int8)))
    return State(jnp.int32(seed), model, moments, jax.random.split(jax.random.key(seed), 3))


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def raw(array: jax.Array) -> tuple[Any, ...]:
    bits = jax.random.key_data(array) if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array
    return array.shape, str(array.dtype), np.asarray(bits).tobytes()


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert list(map(raw, jax.tree.leaves(actual))) == list(map(raw, jax.tree.leaves(expected)))


def test_every_kind_of_leaf_survives_to_the_bit(tmp_path):
    state = make_state()
    data, meta = {"cursor": 2**60, "ratio": 0.1 + 0.2}, {"best": float("inf"), "name": "é"}
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore_latest(abstract(state)) is None
        assert checkpoints.save(7, state, data=data, meta=meta)
        data["cursor"], meta["name"] = 0, "changed while it is written"
        checkpoints.wait()
        assert checkpoints.latest_step() == 7
        found = checkpoints.restore(abstract(state))
    assert_same(found.state, state)
    assert (found.step, found.data, found.meta) == (
        7,
        {"cursor": 2**60, "ratio": 0.1 + 0.2},
        {"best": float("inf"), "name": "é"},
    )
    assert read_meta(tmp_path / "checkpoints", 7) == found.meta
    assert read_leaves(tmp_path / "checkpoints", 7)["model/blocks/0/w"][:2] == ((33, 65), "bfloat16")


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_keep_their_implementation(tmp_path, impl):
    state = {"key": jax.random.key(5, impl=impl), "many": jax.random.split(jax.random.key(6, impl=impl), (2, 2))}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, state, data={}, meta={})
    found = restore(tmp_path, abstract(state)).state
    assert_same(found, state)
    draw = [np.asarray(jax.random.bits(tree["many"][1, 0], (4,))) for tree in (found, state)]
    assert np.array_equal(*draw)


def test_donating_the_state_right_after_save_changes_nothing(tmp_path):
    state = {
        "a": jnp.asarray(np.random.default_rng(0).random((1500, 1500)), jnp.float32),
        "b": jnp.arange(100_000, dtype=jnp.bfloat16),
    }
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    jax.block_until_ready(overwrite(jax.tree.map(jnp.copy, state)))  # compiled, so that it runs at once
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, data={}, meta={})
        after = overwrite(state)
        for _ in range(5):
            after = overwrite(after)
        jax.block_until_ready(after)
        assert state["a"].is_deleted(), "the buffers were not donated, so this test shows nothing"
    found = restore(tmp_path, abstract(after)).state
    assert all(np.array_equal(np.asarray(found[name]), expected[name]) for name in expected)


def changed(state: State, **model: Any) -> State:
    return dataclasses.replace(state, model={**state.model, **model})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: changed(s, blocks=s.model["blocks"] * 2), "not in the checkpoint (2):\n    model/blocks/2/w  bfloat16[33,65]"),
        (
            lambda s: changed(s, blocks=s.model["blocks"][:1]),
            "only in the checkpoint (1):\n    model/blocks/1/w  bfloat16[33,65]",
        ),
        (lambda s: changed(s, codes=jnp.zeros((16, 17), jnp.uint8)), "checkpoint uint8[16,16], wanted uint8[16,17]"),
        (lambda s: changed(s, codes=jnp.zeros((8, 32), jnp.uint8)), "checkpoint uint8[16,16], wanted uint8[8,32]"),
        (lambda s: changed(s, special=jnp.zeros(4, jnp.bfloat16)), "checkpoint float32[4], wanted bfloat16[4]"),
        (lambda s: changed(s, empty=None), "model/empty  float16[0,3]"),
        (
            lambda s: dataclasses.replace(s, key=jax.random.split(jax.random.key(0, impl="rbg"), 3)),
            "checkpoint key<fry>[3], wanted key<rbg>[3]",
        ),
    ],
)
def test_another_tree_is_refused_with_the_difference(tmp_path, change, line):
    state = make_state()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, state, data={}, meta={})
    for read in (restore, restore_latest):
        with pytest.raises(UserError) as caught:
            read(tmp_path, abstract(change(state)))
        assert line in str(caught.value)
        assert str(tmp_path / "3") in str(caught.value)


def test_a_long_difference_is_cut(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, {"a": jnp.zeros(1)}, data={}, meta={})
    wanted = {"a": jnp.zeros(1)} | {f"b{i:03}": jnp.zeros(1) for i in range(100)}
    with pytest.raises(UserError, match=r"not in the checkpoint \(100\)(.|\n)*\.\.\. and 80 more"):
        restore(tmp_path, wanted)


def test_a_part_is_restored_without_the_rest(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, state, data={}, meta={})
    assert_same(restore(tmp_path, abstract(state.model), subtree="model").state, state.model)
    with pytest.raises(UserError, match="only in the checkpoint"):
        restore(tmp_path, abstract({"blocks": state.model["blocks"]}), subtree="model")


def test_old_steps_go_and_milestones_stay(tmp_path):
    with Checkpointer(tmp_path, keep=2, keep_every_steps=20) as checkpoints:
        for step in (10, 20, 30, 40, 50, 60, 70):
            checkpoints.save(step, {"x": jnp.float32(step)}, data={}, meta={})
    assert committed_steps(tmp_path) == [20, 40, 60, 70]
    assert float(restore(tmp_path, {"x": jnp.float32(0)}, step=20).state["x"]) == 20.0


def test_a_step_is_saved_once(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, {"x": jnp.float32(step)}, data={}, meta={})
        assert not checkpoints.save(2, {"x": jnp.float32(2)}, data={}, meta={})
        with pytest.raises(CheckpointError, match="another state of step 2"):
            checkpoints.save(2, {"x": jnp.float32(9)}, data={}, meta={})
        assert checkpoints.discard_after(1) == [2, 3]
        assert checkpoints.save(2, {"x": jnp.float32(9)}, data={}, meta={})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert float(checkpoints.restore({"x": jnp.float32(0)}).state["x"]) == 9.0


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    with Checkpointer(tmp_path / "c") as checkpoints:
        with pytest.raises(TypeError, match="state leaf a/0 is float"):
            checkpoints.save(0, {"a": [1.5]}, data={}, meta={})
        with pytest.raises(TypeError, match="two leaves"):
            checkpoints.save(0, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, data={}, meta={})
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(0, {"a": jnp.ones(1)}, data={"x": jnp.ones(1)}, meta={})
    assert not (tmp_path / "c").exists()


def test_a_missing_step_names_those_there_are(tmp_path):
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        restore(tmp_path / "none", {"x": jnp.ones(1)})
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(4, {"x": jnp.ones(1)}, data={}, meta={})
    with pytest.raises(CheckpointError, match=r"step 5 .*committed steps: 4"):
        restore(tmp_path, {"x": jnp.ones(1)}, step=5)
    with pytest.raises(CheckpointError, match=r"step 5 .*committed steps: 4"):
        read_meta(tmp_path, 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint16", "bool", "complex64"])
def test_digest_is_the_same_on_host_and_device_and_sees_every_bit(dtype):
    for shape in [(), (1025,), (3, 5, 7)]:
        array = jnp.asarray(np.random.default_rng(0).integers(0, 2, shape), dtype)
        digest = digests({"x": array})["x"]
        assert digest == f"{int(_device_digest(array)):08x}"
        if array.size > 1:
            assert digests({"x": jnp.roll(array.reshape(-1), 1).reshape(shape)})["x"] != digest
        values = np.asarray(array).copy()
        values.reshape(-1).view(np.uint8)[-1] ^= 1
        assert digests({"x": jnp.asarray(values)})["x"] != digest


def test_digest_of_a_large_array_is_taken_in_pieces():
    array = jnp.asarray(np.random.default_rng(0).integers(0, 255, (1, 3, 1_000_003)), jnp.uint8)
    assert digests({"x": array})["x"] == f"{int(_device_digest(array)):08x}"
