"""Requests to stop: SIGTERM, SIGUSR1, Ctrl-C and a closed terminal ask the loop to save and leave; a second one does not wait."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SAME_REQUEST_SECONDS = 1.0  # a launcher and the terminal may both pass one Ctrl-C on


class StopRequest:
    """True-ish `name` once a signal has come.

    A thread reads the signals' numbers as well: the main thread runs no handler while it is inside the compiler or waits for
    a device, and a second signal must not wait for either.
    """

    def __init__(self, end: Callable[[int], None] = os._exit) -> None:
        """Take what ends the process at once: called with 128 and the signal's number."""
        self.name: str | None = None
        self._end = end
        self._first: float | None = None
        self._previous: dict[int, object] = {}
        self._read, self._write = socket.socketpair()

    def __enter__(self) -> "StopRequest":
        self._write.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="mlt-signals", daemon=True).start()
        for number in ASKING:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the terminal may go
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._write.close()  # ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name

    def _listen(self) -> None:
        with contextlib.suppress(OSError), self._read:
            while numbers := self._read.recv(16):
                for number in numbers:
                    if number in ASKING:
                        self._heard(number)

    def _heard(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self.name = now, self.name or signal.Signals(number).name
        elif now - self._first >= _SAME_REQUEST_SECONDS:
            show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
            with contextlib.suppress(OSError):  # the terminal may be what went
                sys.stderr.write(
                    f"{show_cursor}mlt: {signal.Signals(number).name} after {self.name}: ended at once, nothing more was saved; "
                    "the same command resumes from the newest checkpoint\n"
                )
                sys.stderr.flush()
            self._end(128 + number)
