"""Durable copies in an object store: S3 as moto's server speaks it on loopback, through TensorStore's own client.

Skipped where the server is not installed: `pip install 'moto[server]'`.
"""

import logging
import shutil
import urllib.request
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from mlt.checkpoint.copier import DurableOptions
from mlt.checkpoint.durable import Durable
from mlt.checkpoint.layout import CheckpointError
from mlt.checkpoint.restore import restore_latest
from mlt.checkpoint.save import Checkpointer
from mlt.checkpoint.show import inspect_text, list_text, verify_text
from mlt.checkpoint.stores import open_store


def state(step: int) -> dict:
    return {"w": jnp.asarray(np.random.default_rng(step).normal(size=(64, 64)), jnp.float32), "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A place in a store that mlt finds by the variables that Amazon's tools read."""
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "none")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "none")
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT"))
        yield "s3://bucket/runs/one"
    running.stop()


@pytest.fixture
def saved(url, tmp_path):
    """Steps 1 to 3, of which the store keeps the newest two; the local ones are lost."""
    open_store(url).delete("2/")
    open_store(url).delete("3/")
    with Checkpointer(tmp_path / "near", keep=2, durable=DurableOptions(url, 1, keep=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), data={"at": step}, meta={"tokens": step})
            checkpoints.close()
        assert checkpoints.durable_state.step == 3
        assert checkpoints.durable_state.failures == 0
    shutil.rmtree(tmp_path / "near")
    return tmp_path / "near"


def test_copies_are_kept_listed_verified_and_restored(saved, url):
    assert Durable(url).steps() == [2, 3]
    assert {name.split("/")[0] for name in open_store(url).names()} == {"2", "3"}
    found = restore_latest(saved, state(0), durable=Durable(url))
    assert (found.step, found.data, found.source) == (3, {"at": 3}, f"{url}/3")
    assert np.array_equal(found.state["w"], state(3)["w"])
    assert list_text(url).count("committed") == 2
    assert "float32[64,64]" in inspect_text(url, 2)
    assert verify_text(url)[1]


def test_a_damaged_object_is_named_and_passed_over(saved, url, caplog):
    store = open_store(url)
    name, content = max(
        ((name, store.read(name)) for name in store.names() if name.startswith("3/state/")), key=lambda file: len(file[1])
    )
    body = bytearray(content)
    body[len(body) // 2] ^= 1
    store.write(name, bytes(body))
    text, whole = verify_text(url)
    assert not whole
    assert name.removeprefix("3/") in text
    with (
        caplog.at_level(logging.WARNING, "mlt.checkpoint"),
        Checkpointer(saved, durable=DurableOptions(url, 1)) as checkpoints,
    ):
        assert checkpoints.restore_latest(state(0)).step == 2
    assert f"checkpoint {url}/3 is damaged" in caplog.text
    assert Durable(url).steps() == [2]


def test_a_bucket_that_is_not_there_is_named(tmp_path, url):
    with Checkpointer(tmp_path / "near") as checkpoints:
        checkpoints.save(1, state(1), data={}, meta={})
    place = url.replace("bucket", "absent")
    with pytest.raises(OSError, match="NoSuchBucket") as error:
        Durable(place).copy(1, tmp_path / "near" / "1")
    assert error.value.filename == place


def test_a_store_that_does_not_answer_costs_no_step_and_no_quarter_of_an_hour(tmp_path, monkeypatch, caplog):
    """Needs no server: nothing listens there."""
    url = "s3://bucket/runs/one"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    tries = {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"}
    monkeypatch.setattr("mlt.checkpoint.stores.RETRIES", {"s3_request_retries": tries})
    with (
        caplog.at_level(logging.WARNING, "mlt.checkpoint"),
        Checkpointer(tmp_path / "near", durable=DurableOptions(url, 1)) as checkpoints,
    ):
        with pytest.raises(CheckpointError, match=rf"cannot read the durable checkpoints in {url}.*connect"):
            checkpoints.restore_latest(state(0))
        checkpoints.save(1, state(1), data={}, meta={})
        checkpoints.close()
        assert checkpoints.durable_state.failing
        assert checkpoints.restore_latest(state(0)).step == 1
    assert f"could not copy checkpoint step 1 to {url}" in caplog.text
