"""What the run's console does where nobody reads: a run goes on without its output."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from mlt.report.console import RunConsole

METRICS = {"train/loss": 2.0, "throughput/tokens_per_second": 123456.0, "data/wait_seconds": 0.5}
RUN = """
from mlt.report.console import RunConsole

metrics = {"train/loss": 2.0, "throughput/tokens_per_second": 1.0, "data/wait_seconds": 0.0}
console = RunConsole(3)
console.say("begun")
input()
console.start(0)
for step in (1, 2, 3):
    console.logged(step, metrics, None)
    console.say("said")
console.stop()
with open("reached", "w") as file:
    file.write("the end")
"""


def begin(folder, output) -> subprocess.Popen[bytes]:
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    return subprocess.Popen(
        [sys.executable, "-c", ignoring + RUN], cwd=folder, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE
    )


def go_on(process: subprocess.Popen[bytes]) -> str:
    _, errors = process.communicate(b"\n", timeout=60)
    assert process.returncode == 0, errors.decode()
    return errors.decode()


def test_a_pipe_that_nobody_reads_ends_no_run(tmp_path):
    process = begin(tmp_path, subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    process.stdout.close()
    process.stdout = None
    assert go_on(process) == "warning: nobody reads what this run prints any more; the run goes on\n"
    assert (tmp_path / "reached").read_text() == "the end"


def test_a_terminal_that_was_closed_ends_no_run(tmp_path):
    ours, theirs = pty.openpty()
    process = begin(tmp_path, theirs)
    os.close(theirs)
    assert os.read(ours, 100).startswith(b"begun")
    os.close(ours)
    assert "Traceback" not in go_on(process)
    assert (tmp_path / "reached").read_text() == "the end"


def test_a_full_disk_ends_no_run(tmp_path):
    with open("/dev/full", "wb") as full:
        process = begin(tmp_path, full)
    assert "Traceback" not in go_on(process)
    assert (tmp_path / "reached").read_text() == "the end"


@pytest.mark.parametrize(("width", "bar"), [(30, False), (80, False), (140, True)])
def test_a_narrow_terminal_shows_the_step_first(width, bar):
    console, shown = RunConsole(100_000), io.StringIO()
    console.console = Console(file=shown, width=width, force_terminal=True, soft_wrap=True)
    console.start(0)
    console.logged(12_345, METRICS, 2.5)
    console.progress.refresh()
    console.stop()
    (line,) = re.findall(r"step 12345/100000  loss 2.00[^\r\n]*", shown.getvalue())[-1:]
    assert ("\u2501" in line) == bar
