"""Batches made ahead: in order, errors where they belong, waits that a signal ends, threads that stop."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mlt.data.loader import DataConfig, load_corpus, open_loader
from mlt.data.prefetch import Prefetcher, WaitStopped, run_stoppable
from mlt.data.sources import Documents
from mlt.data.synthetic import SyntheticText
from mlt.errors import RunFailed

CONFIG = DataConfig(source=SyntheticText(num_documents=40), sequence_length=16, batch_size=4)


def data_threads(others=()):
    """Running threads of loaders, without those of loaders that other tests left open."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("mlt-data") and thread not in others]


@pytest.mark.parametrize(("ahead", "threads"), [(0, 2), (1, 2), (5, 1), (5, 4)])
def test_items_come_in_order_whoever_is_done_first(ahead, threads):
    def make(index):
        time.sleep(0.002 * (index % 3 == 0))
        return index

    items = Prefetcher(make, ahead=ahead, threads=threads)
    assert [items.next() for _ in range(40)] == list(range(40))
    items.close()


def test_no_more_than_asked_for_is_made_ahead():
    made, settled = [], threading.Event()

    def make(index):
        made.append(index)
        if index == 6:
            settled.set()
        return index

    items = Prefetcher(make, ahead=4, threads=2)
    for _ in range(3):
        items.next()
    assert settled.wait(10)
    time.sleep(0.05)  # time enough for one too many
    assert sorted(made) == list(range(7))
    items.close()


@pytest.mark.parametrize("ahead", [0, 3])
def test_an_error_comes_where_its_item_was_and_is_tried_again(ahead):
    failures = {4: 2}

    def make(index):
        if failures.get(index):
            failures[index] -= 1
            raise OSError(f"item {index}")
        return index

    items = Prefetcher(make, ahead=ahead, threads=2)
    assert [items.next() for _ in range(4)] == [0, 1, 2, 3]
    for _ in range(2):
        with pytest.raises(OSError, match="item 4"):
            items.next()
    assert [items.next() for _ in range(4)] == [4, 5, 6, 7]
    items.close()


def test_a_stuck_item_can_be_given_up_and_waited_for_again():
    release = threading.Event()

    def make(index):
        if index == 2:
            assert release.wait(30)
        return index

    items = Prefetcher(make, ahead=4, threads=2)
    assert [items.next(), items.next()] == [0, 1]
    started = time.monotonic()
    with pytest.raises(WaitStopped):
        items.next(stop=lambda: True)
    assert time.monotonic() - started < 5
    release.set()
    assert [items.next(), items.next()] == [2, 3]
    items.close()


def test_closing_ends_the_threads_and_a_waiting_call():
    others = data_threads()
    release = threading.Event()
    items = Prefetcher(lambda _: release.wait(30), ahead=2, threads=2)
    threading.Timer(0.1, lambda: items.close(timeout_seconds=0)).start()
    with pytest.raises(RuntimeError, match="closed"):
        items.next()
    release.set()
    for thread in data_threads(others):
        thread.join(10)
    assert data_threads(others) == []
    with pytest.raises(RuntimeError, match="closed"):
        items.next()


def test_a_loader_stops_its_threads():
    others = data_threads()
    loader = open_loader(CONFIG, load_corpus(CONFIG))
    next(loader)
    assert data_threads(others) != []
    loader.close()
    until = time.monotonic() + 20  # close() waits for one second, which a busy machine may not give a thread
    while data_threads(others) and time.monotonic() < until:
        time.sleep(0.05)
    assert data_threads(others) == []


class Failing(np.ndarray):
    """Ids on a disk that fails until `whole` is set."""

    whole = False

    def __getitem__(self, index):
        if not Failing.whole and isinstance(index, slice):
            raise OSError(5, "Input/output error")
        return np.asarray(self)[index]


@pytest.mark.parametrize("prefetch", [0, 4])
def test_a_row_that_cannot_be_made_names_its_documents_and_can_be_made_later(prefetch):
    corpus = load_corpus(CONFIG)
    (source,) = corpus.sources
    broken = dataclasses.replace(corpus, sources=(dataclasses.replace(source, tokens=source.tokens.view(Failing)),))
    setting = CONFIG.replace(prefetch_batches=prefetch)
    expected = next(open_loader(setting, corpus, first_step=3))
    Failing.whole = False
    loader = open_loader(setting, broken, first_step=3)
    before = loader.state()
    with pytest.raises(
        RunFailed, match=r"row 12 of the data \(row 12 of a synthetic source .*: synthetic-0-\d+.*Input/output error"
    ):
        next(loader)
    assert loader.state() == before
    Failing.whole = True
    for _ in range(5):  # what was made ahead of the repair has failed too
        try:
            batch = next(loader)
            break
        except RunFailed:
            continue
    np.testing.assert_array_equal(batch["tokens"], expected["tokens"])
    loader.close()


def test_reading_can_be_given_up(monkeypatch):
    release = threading.Event()
    documents = Documents("nowhere", ["a", "b"], lambda _: str(release.wait(30)))
    monkeypatch.setattr(SyntheticText, "documents", lambda _: documents)
    started = time.monotonic()
    with pytest.raises(WaitStopped):
        load_corpus(CONFIG, stop=lambda: time.monotonic() > started + 0.2)
    assert time.monotonic() - started < 5
    release.set()


def test_work_is_done_once_and_its_error_is_raised():
    calls = []
    assert run_stoppable(lambda: calls.append(1) or "done") == "done"
    with pytest.raises(ZeroDivisionError):
        run_stoppable(lambda: 1 / 0)
    time.sleep(0.05)
    assert calls == [1]


@pytest.mark.parametrize("where", ["load", "next"])
def test_a_stuck_source_does_not_keep_a_process_from_hearing_sigterm(where, tmp_path):
    """A read from a pipe that nobody writes to never returns; the process still leaves, with the code it chose."""
    program = f"""
import os, signal, sys
from mlt.data.loader import DataConfig, WaitStopped, load_corpus
from mlt.data.prefetch import Prefetcher
from mlt.data.text_files import TextFiles
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
def read(_):
    print("reading", flush=True)
    return open({str(tmp_path / "pipe")!r}, "rb").read()
try:
    if {where!r} == "next":
        Prefetcher(read, ahead=2, threads=1).next(stop=lambda: asked)
    else:
        TextFiles.documents = lambda self: __import__("mlt.data.sources").data.sources.Documents("pipe", ["pipe"], read)
        load_corpus(DataConfig(source=TextFiles(paths=("x",)), sequence_length=8, batch_size=1), stop=lambda: asked)
except WaitStopped:
    sys.exit(75)
"""
    os.mkfifo(tmp_path / "pipe")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout.readline() == b"reading\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 75
    finally:
        process.kill()
        process.stdout.close()
