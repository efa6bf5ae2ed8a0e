"""Tables in host memory: every step, save and resume has the bits of tables on the device."""

import functools
import json
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
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.nn.param import named_leaves
from mlt.optim.dense_adam import DenseAdam
from mlt.optim.lazy_adam import LazyAdam
from mlt.optim.rowwise_adagrad import RowwiseAdagrad
from mlt.parallel.mesh import Layout
from mlt.train.feed import Feed
from mlt.train.hashing import HostHashes
from mlt.train.host_tables import HostTables
from mlt.train.loop import train
from mlt.train.residents import check_host_memory, on_devices, residents
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import abstract_batch, abstract_state, create_state
from mlt.train.step import train_step
from mlt.verify.material import packed_rows

ROWS, LENGTH = 8, 24
QUICK = {"xla_backend_optimization_level": 0}
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


class Stepper:
    """Float32 steps of a config, with everything around them that tables in host memory need."""

    def __init__(self, where: str, layout: Layout | None = None):
        layout = layout or Layout()
        config = small(where, LazyAdam(correction="row"), rows_per_head=4000)
        # The scanned pair alone: its arrays are those of any table, and one more dim.
        config = config.replace(model=config.model.replace(stack=config.model.stack.replace(head=())))
        self.rules, whole = layout.rules(jax.devices()[: layout.num_devices]), describe_model(config)
        self.specs = on_devices(config, whole)
        self.optimizer = build_optimizer(config, self.specs)
        self.abstract = abstract_state(self.specs, self.optimizer, self.rules)
        self.hashes, self.feed = HostHashes(config), Feed(self.rules, ROWS, LENGTH)
        self.tables = HostTables(residents(config, whole), self.rules, seed=0)
        step = functools.partial(train_step, optimizer=self.optimizer, options=step_options(config, self.rules, whole))
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        shapes = abstract_batch(self.rules, ROWS, LENGTH, self.hashes.fields())
        jitted = jax.jit(step, out_shardings=(places, None), donate_argnums=0)
        self.compiled = jitted.lower(self.abstract, shapes).compile(QUICK)

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


def test_steps_saves_and_resumes_have_the_bits_of_tables_on_the_device(host, tmp_path):
    device = Stepper("device")
    expected, told = device.run(device.start(), range(6))
    state, _ = host.run(host.start(), range(4))
    assert all(leaf.shape[-2] < 2000 for name, leaf in named_leaves(state.model) if name.endswith("table"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, host.tables.whole(state), data={}, meta={})
        # The host's tables move on while the checkpoint is written.
        same(host.tables.whole(host.run(state, range(4, 6))[0]), expected)
        restored = checkpointer.restore(host.tables.whole_abstract(host.abstract), step=4).state
        # The very same checkpoint is one of tables on the device.
        same(checkpointer.restore(device.abstract, step=4).state, restored)
    state, said = host.run(host.tables.begin(restored), range(4, 6))
    same(host.tables.whole(state), expected)
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
        rows = host.tables._last[one.parameter]
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


def test_samples_several_processes_and_too_little_memory_are_refused(monkeypatch):
    config = small("host")
    with pytest.raises(ConfigError, match=r"sample.tokens .* needs the whole of .* on the device"):
        check_run(config.replace(sample=config.sample.replace(tokens=5)))
    tables = residents(config, describe_model(config))
    # 2,048 rows of 4 values, two moments and a count; twice as many rows with one number each.
    need = 4 * (2048 * (4 + 4 + 4 + 1) + 2 * 2048 * (4 + 1))
    check_host_memory(tables, need)
    with pytest.raises(UserError, match=r"table 0.00 GiB \(2,048 rows\).* RowwiseAdagrad, .*table_on='device'"):
        check_host_memory(tables, need - 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="2 processes, each with a host of its own; use one process"):
        HostTables(tables, Layout().rules(jax.devices()[:1]))


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
    """Whole runs with evaluations and saves: every array of every checkpoint, and of one that is resumed."""
    saved, metrics, one_device = {}, {}, jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one_device)
    for name, where in (("device", "device"), ("host", "host"), ("resumed", "host")):
        if name == "resumed":
            shutil.copytree(tmp_path / "host", tmp_path / name)
            for step in (8, 12):
                shutil.rmtree(tmp_path / name / "checkpoints" / str(step))
        train(small(where), tmp_path / name)
        folder = tmp_path / name / "checkpoints"
        saved[name] = {step: read_leaves(folder, step) for step in committed_steps(folder)}
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        metrics[name] = [(row["step"], row[key]) for row in rows for key in ("train/loss", "eval/loss") if key in row]
    assert list(saved["device"]) == [4, 8, 12]
    assert saved["host"] == saved["device"]
    assert saved["resumed"] == saved["device"]
    assert len(metrics["device"]) == 14
    assert metrics["device"] == metrics["host"] == metrics["resumed"]
