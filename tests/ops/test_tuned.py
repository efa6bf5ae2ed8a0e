"""Tables of block sizes: they change what is launched, a wrong one is refused, and without one every kernel has its rule's."""

import functools
import json

import jax
import jax.numpy as jnp
import mlt_kernels
import pytest
from mlt_kernels import dispatch, pallas, tuned

CARD = "NVIDIA H100 80GB HBM3"  # JAX lowers for cards that it knows
LINE = {
    "op": "diagonal_recurrence",
    "backend": "pallas_gpu",
    "kernel": "walk",
    "shape": {"item_bytes": 2},
    "sizes": {"channels": 128},
}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned._load.cache_clear()
    yield tmp_path
    tuned._load.cache_clear()


def put(folder, *lines, device=CARD):
    path = folder / tuned.file_of(CARD).name
    path.write_text(json.dumps({"device": device, "kernels": lines}))
    return path


def lowered(op, arguments, device=CARD, backend="pallas_gpu", **static):
    """(text lowered for a GPU, {kernel: sizes its rule chose})."""
    fn = functools.partial(getattr(mlt_kernels, op), **static, implementation=backend)
    with pallas.target_device(device), tuned.asked() as asked:
        text = jax.jit(lambda arguments: fn(**arguments)).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text, {key.kernel: sizes for key, sizes in asked.items()}


def rows(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_no_card_has_a_table_yet():
    """Goes when one has; docs/kernels.md and the folder's README say so too."""
    assert not [*tuned.FOLDER.glob("*.json")]


def test_every_table_that_ships_is_whole():
    for path in tuned.FOLDER.glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert tuned.file_of(device) == path
        assert tuned.table(device)


def test_a_table_changes_what_is_launched_on_its_device_alone(folder):
    arguments = {"a": rows(1, 32, 256), "b": rows(1, 32, 256)}
    by_rule, asked = lowered("diagonal_recurrence", arguments)
    assert asked == {"walk": {"channels": 64}}
    put(folder, LINE)
    tuned._load.cache_clear()
    by_table, asked = lowered("diagonal_recurrence", arguments)
    assert asked == {"walk": {"channels": 64}}, "what a rule chose does not depend on the table"
    assert by_table != by_rule
    assert lowered("diagonal_recurrence", arguments, device="NVIDIA H200")[0] == by_rule
    with tuned.trying({}):
        assert lowered("diagonal_recurrence", arguments)[0] == by_rule


def test_warps_and_slabs_of_the_add_rule(folder):
    tools = pytest.importorskip("mlt_kernels.linear_recurrence._pallas_tools")
    sizes = functools.partial(tools.blocks, K=128, V=64, item_bytes=2, vector=False)
    with pallas.target_device(CARD):
        rule = sizes("keys")
        shape = {"K": 128, "V": 64, "item_bytes": 2, "vector": False}
        line = {"op": "linear_recurrence", "backend": "pallas_gpu", "kernel": "keys", "shape": shape}
        put(folder, line | {"sizes": {"slab": 32, "warps": 4, "stages": 1}})
        tuned._load.cache_clear()
        found = sizes("keys")
        assert (found.slab, found.warps, found.stages, found.chunk) == (32, 4, 1, rule.chunk)
        assert sizes("forward") != found, "a line is of one kernel"
        assert sizes("keys", K=64) != found, "and of one shape"


def test_a_cpu_host_has_the_rules(folder):
    put(folder, LINE)
    assert tuned.table(pallas.device_kind()) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kernel": "wlak"}, "no such kernel"),
        ({"op": "attention"}, "no such kernel"),
        ({"shape": {"K": 64}}, "expected the names"),
        ({"sizes": {"channels": 64, "warps": 4}}, "expected the names"),
        ({"sizes": {"channels": 48}}, "no power of two"),
        ({"sizes": {"channels": 4}}, "less than 8"),
        ({"sizes": {"channels": "64"}}, "no positive integer"),
        ({"sizes": {"channels": True}}, "no positive integer"),
        ({"sizes": None}, "NoneType"),
        ({"shape": None}, "NoneType"),
    ],
)
def test_a_wrong_line_is_refused_with_its_file(folder, change, said):
    path = put(folder, LINE | change)
    with pytest.raises(ValueError, match=said) as error:
        tuned.table(CARD)
    assert str(path) in str(error.value)


def test_sizes_that_do_not_divide_and_warps_that_no_block_has(folder):
    shape = {"K": 64, "V": 128, "item_bytes": 2, "vector": False}
    line = {"op": "linear_recurrence", "backend": "triton_gpu", "kernel": "keys", "shape": shape}
    for sizes, said in (
        ({"keys": 128, "warps": 4, "stages": 2}, "keys=128 does not divide K=64"),
        ({"keys": 8, "warps": 4, "stages": 2}, "less than 16"),
        ({"keys": 32, "warps": 32, "stages": 2}, "more than 16"),
        ({"keys": 32, "warps": 4, "stages": 9}, "more than 8"),
    ):
        put(folder, line | {"sizes": sizes})
        with pytest.raises(ValueError, match=said):
            tuned.table(CARD)


def test_a_file_that_is_no_table_or_of_another_card_is_refused(folder):
    path = put(folder, LINE, device="NVIDIA H200")
    with pytest.raises(ValueError, match=r"nvidia-h100-80gb-hbm3.json: is of device 'NVIDIA H200'"):
        tuned.table(CARD)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"nvidia-h100-80gb-hbm3\.json"):
        tuned.table(CARD)
    path.write_text(json.dumps({"device": CARD}))
    with pytest.raises(ValueError, match="has no 'kernels'"):
        tuned.table(CARD)


def test_a_wrong_table_stops_the_call(folder):
    put(folder, LINE | {"sizes": {"channels": 48}})
    with pytest.raises(ValueError, match="no power of two"):
        lowered("diagonal_recurrence", {"a": rows(1, 32, 256), "b": rows(1, 32, 256)})


def test_a_kernel_asks_by_the_names_of_its_table():
    with pytest.raises(KeyError, match="channels"):
        tuned.sizes("diagonal_recurrence", "pallas_gpu", "walk", {"item_bytes": 2}, {"width": 64})


def test_every_kernel_belongs_to_a_backend():
    for op, backend in tuned.KERNELS:
        assert backend in dispatch.backends(op)
