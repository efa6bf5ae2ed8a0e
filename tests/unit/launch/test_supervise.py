"""Processes of one attempt: logged, ended together, signalled together. And a run of two, restarted."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from mlt.launch.snapshot import code_digest, copy_code
from mlt.launch.supervise import Program, supervise

WAITS = """
import signal, sys, time
def leave(number, frame):
    print("asked by", number, flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(60)
"""


def program(tmp_path, name: str, code: str, **variables: str) -> Program:
    return Program([sys.executable, "-c", code], variables, tmp_path / "logs" / f"{name}.log")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_output_is_kept_and_variables_given(tmp_path, monkeypatch):
    monkeypatch.setenv("MLT_NUM_PROCESSES", "7")
    code = "import os; print(os.environ['OWN'], os.environ.get('MLT_NUM_PROCESSES'), os.getcwd())"
    for _ in range(2):
        ended = supervise([program(tmp_path, n, code, OWN=n) for n in "ab"], tmp_path, 5, print)
    assert (ended.codes, ended.asked) == ([0, 0], None)
    assert (tmp_path / "logs" / "b.log").read_text() == f"b None {tmp_path}\n" * 2


def test_the_rest_is_killed_when_one_fails(tmp_path):
    said = []
    stubborn = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    )
    started = time.monotonic()
    programs = [program(tmp_path, "fails", "raise SystemExit(3)"), program(tmp_path, "stays", stubborn)]
    ended = supervise(programs, tmp_path, 1, said.append)
    assert ended.codes == [3, -signal.SIGKILL]
    assert 1 <= time.monotonic() - started < 20
    assert "process 0 ended with 3, and 1 did not end within 1 s" in said[0]
    assert not alive(int((tmp_path / "logs" / "stays.log").read_text()))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_stops_no_process(tmp_path):
    more_than_a_pipe_holds = "print('x' * (1 << 20), flush=True); raise SystemExit(5)"
    full = Program([sys.executable, "-c", more_than_a_pipe_holds], {}, Path("/dev/full"))
    nowhere = Program([sys.executable, "-c", more_than_a_pipe_holds], {}, tmp_path)
    started = time.monotonic()
    assert supervise([full, nowhere], tmp_path, 5, print).codes == [5, 5]
    assert time.monotonic() - started < 5


def test_a_signal_goes_to_all(tmp_path):
    programs = [program(tmp_path, name, WAITS) for name in "ab"]
    logs = [tmp_path / "logs" / f"{name}.log" for name in "ab"]

    def ask():
        while not all(path.exists() and "ready" in path.read_text() for path in logs):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    ended = supervise(programs, tmp_path, 5, print)
    asking.join()
    assert (ended.codes, ended.asked) == ([75, 75], signal.SIGTERM)
    assert all("asked by 15" in path.read_text() for path in logs)


@pytest.mark.parametrize(("handler", "codes"), [(signal.SIG_DFL, [75]), (signal.SIG_IGN, [0])])
def test_a_closed_terminal_asks_unless_it_is_ignored(tmp_path, handler, codes):
    waits = program(tmp_path, "a", WAITS.replace("60", "3"))

    def close():
        while not waits.log_path.exists() or "ready" not in waits.log_path.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, handler)
    closing = threading.Thread(target=close)
    try:
        closing.start()
        assert supervise([waits], tmp_path, 5, print).codes == codes
    finally:
        closing.join()
        signal.signal(signal.SIGHUP, before)


def test_the_copy_of_the_code_is_whole_and_importable(tmp_path):
    target = tmp_path / f"code-{code_digest()}"
    copy_code(target)
    copy_code(target)
    assert not list(target.rglob("*.pyc"))
    assert (target / "mlt" / "report" / "page.css").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    ended = supervise(
        [
            Program(
                [sys.executable, "-P", "-c", "import mlt, mlt_kernels.dispatch; print(mlt.__file__, mlt_kernels.__file__)"],
                {"PYTHONPATH": str(target)},
                tmp_path / "where.log",
            )
        ],
        tmp_path,
        5,
        print,
    )
    assert ended.codes == [0]
    assert (tmp_path / "where.log").read_text().count(str(target)) == 2
