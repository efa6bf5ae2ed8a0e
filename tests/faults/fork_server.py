"""Runs the command in forks of a process that has imported everything and touched no device: a start costs no imports.

Every fork is a process of its own that the kernel can kill; it trains by the same `main` as the command does.

    python fork_server.py       reads a JSON request a line, answers with two: {"pid": 7}, then {"code": -9, "seconds": 2.1}

A request has `words` (of the command line), `log` (the file that takes both outputs) and `variables` (of the environment; what
JAX reads when it is imported is the server's own).
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Child:
    """One run of the command."""

    def __init__(self, server: "ForkServer", pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self._server = server
        self._ended: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        self._ended = self._server.read()

    def ended(self) -> bool:
        return self._ended is not None

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return None if self._ended is None else self._ended["code"]

    def signal(self, number: int) -> None:
        """Send a signal; the pid cannot have been given to another process before `ended`."""
        if not self.ended():
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def wait(self, timeout: float = 120.0) -> int:
        """Exit code; negative, the signal that killed it. A child that does not end is killed, and that is an error."""
        self._thread.join(timeout)
        if self._ended is None:
            self.kill()
            self._thread.join(30)
            raise AssertionError(f"the command did not end within {timeout:g} s:\n{self.output()[-3000:]}")
        return self._ended["code"]

    @property
    def seconds(self) -> float:
        """Processor time it took."""
        return self._ended["seconds"] if self._ended else 0.0

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class ForkServer:
    """The other end: starts the server, and children through it, one at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        line = [sys.executable, "-u", __file__]
        self._process = subprocess.Popen(line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.read()  # it is ready

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError("the fork server ended")
        return json.loads(line)

    def start(self, words: list[str], log: Path, variables: Mapping[str, str] | None = None) -> Child:
        assert self._process.stdin is not None
        log.parent.mkdir(parents=True, exist_ok=True)
        self._process.stdin.write(json.dumps({"words": words, "log": str(log), "variables": dict(variables or {})}) + "\n")
        self._process.stdin.flush()
        return Child(self, self.read()["pid"], log)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def serve() -> None:
    # What a run would import on its way, so that a child does not; the plots of the report cost more than its steps.
    import grain  # noqa: F401
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tensorstore  # noqa: F401

    import mlt.cli
    import mlt.train.loop

    _say({})
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(request, mlt.cli.main)
        _say({"pid": pid})
        _, status, usage = os.wait4(pid, 0)
        _say({"code": os.waitstatus_to_exitcode(status), "seconds": usage.ru_utime + usage.ru_stime})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _become(request: dict[str, Any], main: Any) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    os.setsid()
    os.environ.update(request["variables"])
    sys.argv = ["mlt", *request["words"]]
    code = 1
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of the libraries end with the process; as at a normal exit, nothing waits for them.
        os._exit(code)


if __name__ == "__main__":
    serve()
