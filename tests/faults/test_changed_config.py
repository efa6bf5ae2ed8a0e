"""What of a config may change when a run is resumed, and what becomes of a config file that is damaged."""

import jax.numpy as jnp
import pytest
from fault_tools import TINY

from mlt.checkpoint.save import Checkpointer
from mlt.config.dump import allowed_changes, binding_changes, config_hash, from_yaml, full_hash, to_yaml
from mlt.config.exempt import FREE, JUDGED, LAYERS, LAYOUT, exemption
from mlt.config.load import load_config
from mlt.config.problems import walk
from mlt.config.run import RunConfig
from mlt.data.mixture import Mixture
from mlt.errors import UserError
from mlt.mixers.channel.engram import Engram
from mlt.mixers.sequence.parallel import Parallel
from mlt.model.block import Block
from mlt.train.run_config import check_config, keep_config
from mlt.train.run_directory import RunDirectory

FREELY = ("train.peer_timeout_seconds=7", "log.every_steps=3", "checkpoint.every_steps=9", "sample.tokens=5", "mesh.fsdp=2")


def config(*sets: str) -> RunConfig:
    loaded = load_config(TINY, sets=sets, root=RunConfig)
    assert isinstance(loaded, RunConfig)
    return loaded


@pytest.mark.parametrize("line", FREELY)
def test_what_changes_no_function_may_change(line):
    old, new = config(), config(line)
    assert binding_changes(old, new) == []
    (told,) = allowed_changes(old, new)
    assert told.startswith(line.partition("=")[0])
    assert config_hash(old) == config_hash(new)
    assert full_hash(old) != full_hash(new)


@pytest.mark.parametrize(
    "line", ["train.steps=9", "train.seed=1", "optimizer.learning_rate=0.1", "data.seed=4", "model.d_model=64"]
)
def test_what_computes_another_run_may_not(line):
    old, new = config(), config(line)
    assert len(binding_changes(old, new)) == 1
    assert allowed_changes(old, new) == []
    assert config_hash(old) != config_hash(new)


def test_exempt_paths_exist():
    paths = {path for path, _ in walk(config())} | {f"data.source.{name}" for name in Mixture.model_fields}
    for node_path, node in walk(config()):
        paths |= {f"{node_path}.{name}".lstrip(".") for name in getattr(type(node), "model_fields", {})}
    assert {*FREE, *LAYOUT, *JUDGED} <= paths


def test_where_a_table_lies_may_change_wherever_its_layer_stands():
    def at(where: str):
        engram = Engram(layer_id=0, layer_ids=(0,), rows_per_head=50, head_dim=4, hash_on=where, table_on=where)
        block = Block(mixers=(Parallel(mixers=(engram.replace(layer_id=1, layer_ids=(1,)),)),))
        model = config().model
        return config().replace(model=model.replace(stack=model.stack.replace(head=(Block(mixers=(engram,)), block))))

    old, new = at("device"), at("host")
    assert binding_changes(old, new) == []
    assert len(allowed_changes(old, new)) == 4
    assert config_hash(old) == config_hash(new) != config_hash(config())
    assert exemption("data.table_on") is None
    assert {*LAYERS} <= {*Engram.model_fields}


def test_a_field_at_its_default_does_not_count():
    """A version of mlt with one more field still knows the checkpoints of the one before."""
    old = config()
    assert old.train.z_loss == type(old.train).model_fields["z_loss"].default
    assert config_hash(config("train.z_loss=0.0")) == config_hash(old)
    assert config_hash(config("train.z_loss=0.5")) != config_hash(old)


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    """Of a run with one checkpoint."""
    found = RunDirectory(tmp_path / "run")
    found.path.mkdir()
    assert keep_config(found, config()) == []
    with Checkpointer(found.checkpoints_path) as checkpointer:
        checkpointer.save(4, {"x": jnp.zeros(2)}, data={}, meta={"config_hash": config_hash(config())})
    return found


def test_the_directory_keeps_the_config_that_it_went_on_with(directory):
    new = config("log.every_steps=3", "mesh.fsdp=2")
    check_config(directory, new)
    assert len(keep_config(directory, new)) == 2
    assert from_yaml(directory.config_path.read_text()) == new
    assert "mesh.fsdp: 1 -> 2" in (directory.logs_path / "config_changes.txt").read_text()
    assert keep_config(directory, new) == []


def test_another_run_is_refused_with_the_difference(directory):
    before = directory.config_path.read_text()
    with pytest.raises(UserError, match=r"train\.steps: 24 -> 9\n.*choose another --run-dir"):
        check_config(directory, config("train.steps=9"))
    assert directory.config_path.read_text() == before


@pytest.mark.parametrize("size", [0, 30, 400, -1])
def test_a_config_that_was_cut_off_is_mended(directory, size):
    """The checkpoints know their config by its hash."""
    text = directory.config_path.read_text()
    directory.config_path.write_text(text[:size])
    check_config(directory, config())
    (told,) = keep_config(directory, config())
    assert "was damaged" in told
    assert directory.config_path.read_text() == text


def test_a_damaged_config_is_not_mended_with_another_one(directory):
    cut = directory.config_path.read_text()[:400]
    directory.config_path.write_text(cut)
    with pytest.raises(UserError):
        check_config(directory, config("train.seed=1"))
    assert directory.config_path.read_text() == cut


def test_without_a_checkpoint_only_a_torn_line_is_mended(tmp_path):
    found = RunDirectory(tmp_path)
    text = to_yaml(config())
    found.config_path.write_text(text[: text.index("train:") + 3])
    check_config(found, config())
    keep_config(found, config())
    assert found.config_path.read_text() == text
    with pytest.raises(UserError, match=r"train\.seed: 0 -> 1"):
        check_config(found, config("train.seed=1"))
