"""Requests to stop: the first is noted, a second one ends the process, and the compiler keeps nobody waiting."""

import errno
import io
import os
import queue
import signal
import threading
import time

import pytest

from mlt.train.background import Worker, unfinished
from mlt.train.signals import ASKING, StopRequest


def test_the_first_signal_is_noted_and_a_later_one_ends_the_process(capsys):
    ends: queue.Queue[int] = queue.Queue()
    before = [signal.getsignal(number) for number in ASKING]
    with StopRequest(end=ends.put) as stop:
        assert stop.name is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # passed on twice: one request
        time.sleep(0.3)
        assert stop.name == "SIGUSR1"
        assert ends.empty()
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ends.get(timeout=10) == 128 + signal.SIGTERM
    assert "SIGTERM after SIGUSR1: ended at once" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in ASKING] == before


def test_a_closed_terminal_asks_but_not_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, name in ((signal.SIG_DFL, "SIGHUP"), (signal.SIG_IGN, None)):
            signal.signal(signal.SIGHUP, handler)
            with StopRequest() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(0.1)
                assert stop.name == name
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_the_process_where_nothing_can_be_printed(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, text)

    ends: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr("sys.stderr", Gone())
    with StopRequest(end=ends.put) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1.2)
        assert stop.name == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ends.get(timeout=10) == 128 + signal.SIGUSR1


def test_work_in_the_background_can_be_left_and_its_error_comes_back():
    release = threading.Event()
    worker = Worker("test")
    stuck = worker.do(release.wait)
    behind = worker.do(lambda: 1 / 0)
    assert not stuck.wait(0.01)
    assert unfinished()
    release.set()
    assert stuck.result() is True
    with pytest.raises(ZeroDivisionError):
        behind.result()
    end = time.monotonic() + 10
    while unfinished():
        assert time.monotonic() < end
        time.sleep(0.01)
