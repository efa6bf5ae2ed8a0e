"""Restored in another type when asked, in pieces, within the stated memory."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.checkpoint import arrays
from mlt.checkpoint.arrays import StoredArrays
from mlt.checkpoint.keep import Keep
from mlt.checkpoint.layout import CheckpointError, read_leaves, step_files
from mlt.checkpoint.restore import restore
from mlt.checkpoint.save import Checkpointer
from mlt.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    rng = np.random.default_rng(0)
    state = {
        "model": {"w": jnp.asarray(rng.normal(size=(33, 65)), jnp.float32), "codes": jnp.arange(9, dtype=jnp.uint8)},
        "optimizer": {
            "mu": {"w": jnp.asarray(rng.normal(size=(33, 65)), jnp.float32)},
            "nu": {"w": jnp.asarray(rng.normal(size=(33, 65)) * 1e30, jnp.bfloat16)},
            "count": jnp.int32(7),
        },
        "key": jax.random.key(3),
    }
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(1, state, data={}, meta={})
    return folder, state


def test_types_change_only_where_asked_and_to_the_nearest(saved):
    folder, state = saved
    found = restore(folder, state, dtypes={"optimizer": "bfloat16", "optimizer/nu": "float32"}).state
    assert found["optimizer"]["mu"]["w"].dtype == jnp.bfloat16
    assert np.array_equal(found["optimizer"]["mu"]["w"], state["optimizer"]["mu"]["w"].astype(jnp.bfloat16))
    assert found["optimizer"]["nu"]["w"].dtype == jnp.float32
    assert np.array_equal(found["optimizer"]["nu"]["w"], np.asarray(state["optimizer"]["nu"]["w"], np.float32))
    assert found["optimizer"]["count"].dtype == jnp.int32
    assert found["model"]["w"].dtype == jnp.float32
    assert np.array_equal(found["model"]["w"], state["model"]["w"])
    assert np.array_equal(jax.random.key_data(found["key"]), jax.random.key_data(state["key"]))


def test_everything_can_be_asked_for_and_a_part_restored_in_it(saved):
    folder, state = saved
    found = restore(folder, state["model"], subtree="model", dtypes={"": "float16"}).state
    assert np.array_equal(found["w"], np.asarray(state["model"]["w"]).astype(np.float16))
    assert np.array_equal(found["codes"], state["model"]["codes"])


def test_a_type_is_never_changed_silently_nor_to_another_kind(saved):
    folder, state = saved
    other = {**state, "model": {**state["model"], "w": jax.ShapeDtypeStruct((33, 65), jnp.bfloat16)}}
    for dtypes in (None, {"optimizer": "bfloat16"}, {"mod": "bfloat16"}):
        with pytest.raises(UserError, match=r"model/w  checkpoint float32\[33,65\], wanted bfloat16\[33,65\]"):
            restore(folder, other, dtypes=dtypes)
    assert restore(folder, other, dtypes={"model": "bfloat16"}).state["model"]["w"].dtype == jnp.bfloat16
    with pytest.raises(UserError, match="cannot restore model as 'int8'; choose one of float32, bfloat16, float16"):
        restore(folder, state, dtypes={"model": "int8"})
    odd = {**state, "model": {**state["model"], "codes": jax.ShapeDtypeStruct((9,), jnp.float32)}}
    with pytest.raises(UserError, match="checkpoint uint8"):
        restore(folder, odd, dtypes={"": "float32"})


def test_the_stored_bits_are_verified_before_they_are_rounded(tmp_path):
    state = {"w": jnp.ones((64, 64))}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, data={}, meta={})
    path = max((tmp_path / "1" / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(path.read_bytes())
    content[content.find(np.float32(1).tobytes() * 8)] ^= 1  # the last bit of a number, which bfloat16 drops
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="the bits of w are not those that were saved"):
        restore(tmp_path, state, dtypes={"w": "bfloat16"})


@pytest.mark.parametrize("piece", [64, 1000, 1 << 20])
def test_pieces_cover_every_box_once_whatever_their_size(tmp_path, monkeypatch, piece):
    value = np.random.default_rng(1).normal(size=(7, 11, 5)).astype(np.float32)
    monkeypatch.setattr("mlt.checkpoint.writer.PIECE_BYTES", 128)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.asarray(value), "scalar": jnp.float32(3)}, data={}, meta={})
    monkeypatch.setattr(arrays, "PIECE_BYTES", piece)
    stored, leaves = StoredArrays(step_files(tmp_path / "1")), read_leaves(tmp_path, 1)
    array = stored.open("x", leaves["x"])
    assert max(array.chunk_layout.read_chunk.shape) < 11, "one chunk holds everything, so this test shows nothing"
    again = np.full_like(value, np.nan)
    for box, part in stored.pieces("x", leaves["x"]):
        here = tuple(slice(*ends) for ends in box)
        assert np.isnan(again[here]).all()
        again[here] = part.values
    assert np.array_equal(again, value)
    for box in ([(0, 7), (0, 11), (0, 5)], [(2, 6), (3, 4), (1, 5)], [(6, 7), (10, 11), (0, 1)]):
        assert np.array_equal(stored.read("x", array, box).values, value[tuple(slice(*ends) for ends in box)])
    for name, leaf in leaves.items():
        stored.verify(name, leaf)
    assert float(restore(tmp_path, {"x": value_like(value), "scalar": jnp.float32(0)}).state["scalar"]) == 3.0


def value_like(value: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def test_a_restore_holds_no_second_copy():
    """Python and JAX are 180 MB of the peak, what is in flight 150: a second copy of the state would be 400 more."""
    line = [sys.executable, ROOT / "tools" / "restore_memory.py", "--megabytes", "400", "--largest", "50", "--limit", "2.1"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_newest_the_divisible_and_the_pinned_stay():
    assert Keep(2).superfluous([5, 1, 9, 7]) == [1, 5]
    assert Keep(1, 4).superfluous([4, 6, 8, 10, 12, 14], pinned={6}) == [10]
    assert Keep(9).superfluous([1, 2]) == []
