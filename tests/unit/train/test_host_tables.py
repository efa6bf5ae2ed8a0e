"""Tables in host memory: every step, save and resume has the bits of tables on the device."""

import dataclasses
import functools
import json
import math
import os
import shutil

import jax
import numpy as np
import pytest

from mlt.checkpoint.layout import committed_steps, read_leaves
from mlt.checkpoint.save import Checkpointer
from mlt.config.check import check_run
from mlt.config.load import load_config
from mlt.config.problems import ConfigError
from mlt.config.run import RunConfig
from mlt.data.synthetic import SyntheticText
from mlt.errors import UserError
from mlt.mixers.channel.engram import Engram
from mlt.model.block import Block
from mlt.model.lm import LM, LMConfig
from mlt.model.stack import Stack
from mlt.nn.param import constant, named_leaves, put
from mlt.optim.dense_adam import DenseAdam
from mlt.optim.lazy_adam import LazyAdam
from mlt.optim.rowwise_adagrad import RowwiseAdagrad
from mlt.parallel.mesh import Layout
from mlt.plan.memory import device_bytes
from mlt.plan.text import plan_text
from mlt.train.feed import Feed
from mlt.train.fit import check_fits
from mlt.train.hashing import HostHashes, distinct_field
from mlt.train.host_tables import HostTables
from mlt.train.loop import train
from mlt.train.residents import TABLE, check_host_memory, check_parts, moving_bytes, on_devices, residents
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import TrainState, abstract_batch, abstract_state, create_state
from mlt.train.step import train_step
from mlt.verify.material import packed_rows

ROWS, LENGTH = 8, 24
FULL = bool(os.environ.get("MLT_FULL"))
OPTIMIZERS = (LazyAdam(names="*head*", correction="row"), RowwiseAdagrad())


def engram(number: int, where: str, **fields) -> Engram:
    settings = {"rows_per_head": 1500, "head_dim": 4, "heads_per_order": 1, "max_ngram": 2, "conv": False, "pad_token_id": 258}
    return Engram(layer_id=number, layer_ids=(0, 3), **settings | {"table_on": where, "hash_on": where} | fields)


def small(where: str, tables=OPTIMIZERS, **fields) -> RunConfig:
    """One table in front and a scanned pair, of which a batch can read about a fifth."""
    config = load_config("tests/faults/tiny.py")
    layers = (engram(0, where, **fields), engram(3, where, **fields))
    stack = Stack(head=(Block(mixers=layers[:1]),), period=(Block(mixers=layers[1:]),), repeats=2)
    return config.replace(
        model=LMConfig(d_model=16, vocab_size=272, stack=stack),
        data=config.data.replace(source=SyntheticText(num_documents=40), batch_size=ROWS, sequence_length=LENGTH),
        optimizer=config.optimizer.replace(tables=tables),
        train=config.train.replace(steps=12),
        evaluation=config.evaluation.replace(every_steps=6),
    )


def described(where: str) -> tuple[RunConfig, LM]:
    """A config with the scanned pair alone, whose arrays are those of any table and one more dim, and its described model."""
    config = small(where, LazyAdam(correction="row"), rows_per_head=4000)
    config = config.replace(model=config.model.replace(stack=config.model.stack.replace(head=())))
    return config, describe_model(config)


class Stepper:
    """Float32 steps of a config, with everything around them that tables in host memory need."""

    def __init__(self, where: str, layout: Layout | None = None, hosts: int = 1):
        layout = layout or Layout()
        config, whole = described(where)
        self.rules = layout.rules(jax.devices()[: layout.num_devices])
        self.specs, found = on_devices(config, whole, hosts), residents(config, whole, hosts)
        self.optimizer = build_optimizer(config, self.specs)
        self.abstract = abstract_state(self.specs, self.optimizer, self.rules)
        self.hashes, self.feed = HostHashes(config, found), Feed(self.rules, ROWS, LENGTH)
        self.tables = HostTables(found, self.rules, seed=0)
        step = functools.partial(train_step, optimizer=self.optimizer, options=step_options(config, self.rules, whole))
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        shapes = abstract_batch(self.rules, ROWS, LENGTH, self.hashes.fields())
        jitted = jax.jit(step, out_shardings=(places, None), donate_argnums=0)
        self.compiled = jitted.lower(self.abstract, shapes).compile()

    def start(self):
        return self.tables.begin(create_state(self.specs, self.optimizer, self.rules, seed=0))

    def run(self, state, numbers):
        """Steps on batches that share some rows; that of step 2 has a loss that is not finite."""
        for number in numbers:
            batch = packed_rows(np.random.default_rng(number % 3), rows=ROWS, length=LENGTH, num_ids=40)
            batch["tokens"][:, ::5] += number
            batch["weights"][0, 0] = np.nan if number == 2 else 1.0
            state, fed = self.tables.enter(state, self.hashes(batch))
            state, metrics = self.compiled(state, self.feed(fed))
            self.tables.leave(state)
        return state, metrics


def same(one, two) -> None:
    for (name, a), (_, b) in zip(named_leaves(one), named_leaves(two), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32), err_msg=name)


@pytest.fixture(scope="module")
def host():
    return Stepper("host")


@pytest.fixture(scope="module")
def device():
    return Stepper("device")


def test_steps_saves_and_resumes_have_the_bits_of_tables_on_the_device(host, device, tmp_path):
    expected, told = device.run(device.start(), range(6))
    state, _ = host.run(host.start(), range(4))
    assert all(leaf.shape[-2] < 2000 for name, leaf in named_leaves(state.model) if name.endswith("table"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, host.tables.whole(state), data={}, meta={})
        # The host's tables move on while the checkpoint is written.
        same(host.tables.whole(host.run(state, range(4, 6))[0]), expected)
        restored = checkpointer.restore(host.tables.whole_abstract(host.abstract), step=4).state
        # The very same checkpoint is one of tables on the device: a run may go on either way.
        there = checkpointer.restore(device.abstract, step=4).state
        same(there, restored)
    state, said = host.run(host.tables.begin(restored), range(4, 6))
    same(host.tables.whole(state), expected)
    same(device.run(there, range(4, 6))[0], expected)
    with Checkpointer(tmp_path / "device") as checkpointer:
        checkpointer.save(4, device.run(device.start(), range(4))[0], data={}, meta={})
        restored = checkpointer.restore(host.tables.whole_abstract(host.abstract), step=4).state
    same(host.tables.whole(host.run(host.tables.begin(restored), range(4, 6))[0]), expected)
    assert told.keys() == said.keys()
    for name, value in told.items():
        assert float(value) == float(said[name]), name


def test_a_row_that_two_steps_read_is_never_taken_from_the_host_too_early(host, monkeypatch):
    """Without what the devices hand on, the second step would read rows from before the first: the test above can fail."""
    right = host.tables.whole(host.run(host.start(), (0, 3))[0])
    monkeypatch.setattr(HostTables, "_write", lambda *_: None)
    state = host.run(host.start(), (0, 3))[0]
    # Nothing was written back, and still the second step had the rows of the first.
    held = {name: np.asarray(leaf) for name, leaf in named_leaves(state.model) if name.endswith("table")}
    monkeypatch.undo()
    whole = dict(named_leaves(right.model))
    for one in host.tables.tables:
        rows = host.tables._last[one.parameter].rows_U
        np.testing.assert_array_equal(held[one.parameter][..., : rows.size, :], np.asarray(whole[one.parameter])[..., rows, :])


def test_a_failed_write_back_ends_the_run(host, monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(HostTables, "_write", fail)
    with pytest.raises(MemoryError, match="no room"):
        host.run(host.start(), range(4))
    host.tables._writes.clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": None}, r"optimizer.tables .*head.0.sub_layers.0.mixer.table, in host memory, from a dense gradient"),
        ({"tables": DenseAdam()}, r"optimizer.tables .*DenseAdam.* dense gradient"),
        ({"rows_per_head": 100}, r"data.batch_size .* 1,024 rows of .* which has 1,024"),
        ({"hash_on": "device"}, r"head\[0\].mixers\[0\].table_on .* set hash_on='host' too"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(changes, message):
    check_run(small("host"))
    with pytest.raises(ConfigError, match=message):
        check_run(small("host", **changes))


def test_samples_and_too_little_memory_are_refused():
    config = small("host")
    with pytest.raises(ConfigError, match=r"sample.tokens .* needs the whole of .* on the device"):
        check_run(config.replace(sample=config.sample.replace(tokens=5)))
    tables = residents(config, describe_model(config))
    # 2,048 rows of 4 values, two moments and a count; twice as many rows with one number each.
    need = 4 * (2048 * (4 + 4 + 4 + 1) + 2 * 2048 * (4 + 1))
    check_host_memory(tables, 3 * need)
    with pytest.raises(UserError, match=r"table 0.00 GiB \(2,048 rows\).* RowwiseAdagrad, .*table_on='device'"):
        check_host_memory(tables, 3 * need - 1)


def test_a_table_in_two_parts_has_the_bits_of_one(host):
    """What two hosts would hold, each with a room of its own on the devices, here in one process."""
    two = Stepper("host", hosts=2)
    (one,), (parts,) = host.tables.tables, two.tables.tables
    assert parts.room == 2 * one.room
    (expected, told), (found, said) = (stepper.run(stepper.start(), range(4)) for stepper in (host, two))
    same(host.tables.whole(expected), two.tables.whole(found))
    assert {name: float(value) for name, value in told.items()} == {name: float(value) for name, value in said.items()}


@pytest.mark.parametrize(("layout", "hosts"), [(Layout(fsdp=4), 2), (Layout(fsdp=2, replica=2), 2), (Layout(fsdp=4), 1)])
def test_rows_come_to_their_owners_and_go_back(layout, hosts):
    """Steps that only add to what they read, over the mesh: every row has what all steps before made of it."""
    config, whole = described("host")
    rules, (one,) = layout.rules(jax.devices()[: layout.num_devices]), residents(config, whole, hosts)
    tables, places = HostTables([one], rules), one.places(rules)
    state = {name: put(np.zeros(shape, np.float32), places[name]) for name, shape in one.shapes(one.room).items()}
    spec = dataclasses.replace(one.spec, init=dataclasses.replace(constant(0.0), layer=constant(0.0)))
    tables.tables[0] = one = dataclasses.replace(one, spec=spec)
    made = TrainState(0, {one.parameter: state.pop(TABLE)}, {"tables": {k: {one.parameter: v} for k, v in state.items()}}, 0, 0)
    state = tables.begin(made)
    expected = {name: np.zeros(shape, np.float32) for name, shape in one.shapes(one.spec.shape[-2]).items()}
    rng = np.random.default_rng(0)
    for number in range(5):
        rows_U = np.unique(rng.integers(0, one.spec.shape[-2], 300) // 3)
        positions_U = one.positions_of(rows_U)
        assert (positions_U // one.held == rows_U // one.own_rows).all()
        state, _ = tables.enter(state, {distinct_field(one.layer): rows_U})
        held = {TABLE: state.model[one.parameter]} | {k: v[one.parameter] for k, v in state.optimizer["tables"].items()}
        for name, array in held.items():
            np.testing.assert_array_equal(np.asarray(array)[one.at(name, positions_U)], expected[name][one.at(name, rows_U)])
            expected[name][one.at(name, rows_U)] += number + 1
        state = jax.tree.map(lambda x, number=number: x + number + 1 if isinstance(x, jax.Array) else x, state)
        tables.leave(state)
    whole_state = tables.whole(state)
    np.testing.assert_array_equal(whole_state.model[one.parameter], expected[TABLE])
    for name, arrays in whole_state.optimizer["tables"].items():
        np.testing.assert_array_equal(arrays[one.parameter], expected[name])


def test_parts_that_would_travel_whole_are_refused():
    config, whole = described("host")
    rules = Layout().rules(jax.devices()[:1])
    HostTables(residents(config, whole, 2), rules)
    with pytest.raises(UserError, match=r"can read 1,024 rows of .*table.* each of 16 hosts holds 256: all of them would travel"):
        HostTables(residents(config, whole, 16), rules)
    (one,) = residents(config, whole)
    wide = dataclasses.replace(one, held=2**27, hosts=16, spec=dataclasses.replace(one.spec, shape=(2**34, 1), axes=(None, None)))
    with pytest.raises(UserError, match=r"room for 2,147,483,648 rows .* ids count 2,147,483,647"):
        check_parts([wide])


def test_the_plan_counts_a_table_where_it_lies(host, device):
    """Of the compiled programs, that with the table on the device is given exactly what the plan leaves out for the other."""
    (one,) = host.tables.tables
    given = {name: step.compiled.memory_analysis().argument_size_in_bytes for name, step in (("host", host), ("device", device))}
    on_host, on_device = (described(where) for where in ("host", "device"))
    # A batch brings the rows, as large as the documents' numbers, which nothing else reads here.
    assert given["device"] - given["host"] == one.nbytes(one.spec.shape[-2]) - one.nbytes(one.held)
    # The table is updated by rows: value, two moments and a count. In its place there are three sets of buffers.
    saved = device_bytes(*on_device) - device_bytes(*on_host)
    assert saved == one.nbytes(one.spec.shape[-2]) - 3 * one.nbytes(one.held)
    assert one.host_bytes == one.nbytes(one.spec.shape[-2]) == 4 * math.prod(one.spec.shape[:2]) * (4 + 4 + 4 + 1)
    plan = plan_text(*on_host)
    held = one.host_bytes / 2**20
    assert f"host memory  {held:.1f} MiB of each process for tables" in plan
    assert f"; {3 * held:.1f} MiB while a checkpoint is taken" in plan
    assert "host memory" not in plan_text(*on_device)


def test_what_does_not_fit_the_devices_with_rows_in_flight_is_refused(host):
    abstract, rules, tables = host.abstract, host.rules, host.tables.tables
    moving = moving_bytes(tables, rules)
    assert moving == 2 * tables[0].nbytes(tables[0].held)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    check_fits(abstract, host.specs, rules, state + moving, besides=moving)
    with pytest.raises(UserError, match=r"rows of tables in host memory, on their way[^+]*fewer tokens a batch"):
        check_fits(abstract, host.specs, rules, state + moving - 1, besides=moving)


@pytest.mark.skipif(not FULL, reason="minutes; MLT_FULL=1 runs it")
@pytest.mark.parametrize("layout", [Layout(fsdp=8), Layout(replica=2, fsdp=2, context=2)], ids=["owners", "copies"])
def test_rows_over_devices_are_those_of_one(layout, host):
    (one, told), (two, said) = (stepper.run(stepper.start(), range(5)) for stepper in (host, Stepper("host", layout)))
    assert float(said["train/grad_norm"]) == pytest.approx(float(told["train/grad_norm"]), rel=1e-5)
    for (name, a), (_, b) in zip(named_leaves(one), named_leaves(two), strict=True):
        scale = np.abs(np.asarray(a, np.float64)).max() + 1e-12
        assert np.abs(np.asarray(a, np.float64) - np.asarray(b)).max() <= 2e-4 * scale, name


@pytest.mark.skipif(not FULL, reason="minutes; MLT_FULL=1 runs it")
def test_a_run_is_that_of_tables_on_the_device_and_resumes(tmp_path, monkeypatch):
    """Whole runs with evaluations and saves: every array of every checkpoint, and of runs that were resumed either way."""
    saved, metrics, one_device = {}, {}, jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one_device)
    resumed = {"again": ("host", "host"), "to host": ("device", "host"), "to device": ("host", "device")}
    for name, (source, where) in {"device": (None, "device"), "host": (None, "host"), **resumed}.items():
        if source is not None:
            shutil.copytree(tmp_path / source, tmp_path / name)
            for step in (8, 12):
                shutil.rmtree(tmp_path / name / "checkpoints" / str(step))
        train(small(where), tmp_path / name)
        folder = tmp_path / name / "checkpoints"
        saved[name] = {step: read_leaves(folder, step) for step in committed_steps(folder)}
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        metrics[name] = [(row["step"], row[key]) for row in rows for key in ("train/loss", "eval/loss") if key in row]
    assert list(saved["device"]) == [4, 8, 12]
    assert len(metrics["device"]) == 14
    for name in saved:
        assert saved[name] == saved["device"], name
        assert metrics[name] == metrics["device"], name
