"""A state that no device can hold is refused before anything is made, and no other."""

import re
from types import SimpleNamespace

import jax
import pytest

from mlt.config.load import load_config
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.mixers.channel.product_key_memory import ProductKeyMemory
from mlt.model.block import Block
from mlt.nn.param import named_leaves
from mlt.optim.adafactor import Adafactor
from mlt.optim.rowwise_adagrad import RowwiseAdagrad
from mlt.parallel.memory import bytes_on_device, device_limit, machine_bytes
from mlt.parallel.mesh import Layout
from mlt.train.fit import check_batches, check_fits
from mlt.train.setup import build_optimizer, describe_model, prepare
from mlt.train.state import abstract_state, create_state


def small(*, tables=None, memory: bool = False, optimizer=None) -> RunConfig:
    config = load_config("configs/families/transformer.py", args=["sequence_length=24", "batch_size=8"])
    if memory:
        keys = ProductKeyMemory(num_keys=24, num_selected=3, num_heads=2, key_dim=16, value_dim=12)
        stack = config.model.stack.replace(head=(Block(mixers=(keys,)),))
        config = config.replace(model=config.model.replace(stack=stack))
    return config.replace(optimizer=(optimizer or config.optimizer).replace(tables=tables))


def described(config: RunConfig, layout: Layout | None = None):
    """(abstract state, specs, rules, keywords) on a mesh without devices."""
    specs, rules = describe_model(config), (layout or Layout()).abstract_rules()
    optimizer = build_optimizer(config, specs)
    return abstract_state(specs, optimizer, rules), specs, rules, {"lazy": getattr(optimizer, "lazy", ())}


def state_bytes(abstract) -> int:
    return sum(map(bytes_on_device, jax.tree.leaves(abstract)))


@pytest.mark.parametrize("layout", [Layout(), Layout(fsdp=4, tensor=2), Layout(replica=2, fsdp=2, zero=1)], ids=str)
def test_exactly_what_the_state_takes_is_asked_for(layout):
    """No byte less than the arrays of a step's arguments, on one device; and no byte more, or what fits would be refused."""
    abstract, specs, rules, options = described(small(), layout)
    check_fits(abstract, specs, rules, state_bytes(abstract), **options)
    with pytest.raises(UserError, match="the train state does not fit"):
        check_fits(abstract, specs, rules, state_bytes(abstract) - 1, **options)


def test_the_bytes_are_those_that_a_state_then_has():
    config, layout = small(), Layout(fsdp=4)
    specs, rules = describe_model(config), layout.rules(jax.devices()[:4])
    state = create_state(specs, build_optimizer(config, specs), rules, seed=0)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert state_bytes(described(config, layout)[0]) == held


def test_dense_gradients_of_tables_count_and_rows_do_not():
    abstract, specs, rules, options = described(small(memory=True), Layout(fsdp=2))
    assert options["lazy"] == ()
    tables = sum(bytes_on_device(leaf) for name, leaf in named_leaves(abstract.model) if name.endswith(".values"))
    assert tables == 4 * 24 * 24 * 12 // 2
    check_fits(abstract, specs, rules, state_bytes(abstract) + tables, **options)
    with pytest.raises(UserError, match="gradients of tables that are not updated by rows"):
        check_fits(abstract, specs, rules, state_bytes(abstract) + tables - 1, **options)
    abstract, specs, rules, options = described(small(memory=True, tables=RowwiseAdagrad()), Layout(fsdp=2))
    check_fits(abstract, specs, rules, state_bytes(abstract), **options)


def refusal(config: RunConfig, layout: Layout | None = None, share: float = 0.5) -> str:
    abstract, specs, rules, options = described(config, layout)
    with pytest.raises(UserError) as caught:
        check_fits(abstract, specs, rules, int(share * state_bytes(abstract)), **options)
    return str(caught.value)


def test_the_message_has_bytes_by_group_and_ways_out_that_apply():
    said = refusal(small())
    size = r"[\d.]+ [KM]iB"
    assert re.search(rf"takes at least {size} of each device, which has {size}\n +{size}  parameters\n", said)
    assert re.search(rf"\n +{size}  state of the optimizer\n", said)
    assert "Adafactor" in said
    assert "tables" not in said
    assert "train.check_memory=false" in said
    assert "Adafactor" not in refusal(small(optimizer=Adafactor(learning_rate=1e-3, min_dim=8)))
    assert "RowwiseAdagrad" in refusal(small(memory=True))
    assert "mesh.zero=3" in refusal(small(), Layout(fsdp=2, zero=2))
    assert "mesh.zero" not in refusal(small(), Layout(fsdp=2))


def test_as_many_shards_as_are_named_are_enough_where_all_can_be_split():
    config = small()
    needed = state_bytes(described(config)[0])
    shards = int(re.search(r"mesh\.fsdp=(\d+) or more", refusal(config, share=0.26))[1])
    assert shards == 4
    assert state_bytes(described(config, Layout(fsdp=shards))[0]) < 0.27 * needed


def device(platform: str, stats) -> SimpleNamespace:
    return SimpleNamespace(platform=platform, memory_stats=lambda: stats() if callable(stats) else stats)


def unimplemented():
    raise NotImplementedError


def test_what_devices_have(monkeypatch):
    gpus = [device("gpu", {"bytes_limit": size}) for size in (80, 70)]
    assert device_limit(gpus) == 70
    for stats in (None, {}, unimplemented):
        assert device_limit([device("tpu", stats)]) is None
        assert device_limit([*gpus, device("tpu", stats)]) == 70
    assert device_limit([]) is None
    # The devices of a CPU share its memory, and those that the mesh leaves idle take none.
    assert device_limit([device("cpu", None)] * 4) == machine_bytes() // 4
    # What such an allocator reports is where it begins to give memory back.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
    assert device_limit(gpus) is None


def test_batches_that_the_machine_cannot_prepare_are_refused():
    data = small().data
    held = (1 + data.prefetch_batches) * 8 * 24 * 20
    check_batches(data, limit=held)
    check_batches(data, processes=2, limit=held // 2)
    with pytest.raises(UserError, match=r"8 rows of 24 tokens are 3.8 KiB a batch .* and 5 are held at once"):
        check_batches(data, limit=held - 1)


@pytest.mark.parametrize("checked", [True, False])
def test_a_run_is_refused_before_its_corpus_is_read_unless_told_not_to_look(monkeypatch, checked):
    config = small()
    config = config.replace(train=config.train.replace(check_memory=checked))
    monkeypatch.setattr("mlt.train.setup.load_corpus", unreadable)
    monkeypatch.setattr("mlt.parallel.memory.machine_bytes", lambda: 10_000)
    with pytest.raises(UserError, match="does not fit" if checked else "the corpus was read"):
        prepare(config, Layout().rules(jax.devices()[:1]))


def unreadable(*_, **__):
    raise UserError("the corpus was read")
