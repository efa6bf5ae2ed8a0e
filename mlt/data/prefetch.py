"""Making items ahead in background threads, handed out in order, with waits that a request to stop can end.

A thread that is stuck in a read cannot be stopped, but nobody has to wait for it: the threads are daemons, and every wait here
wakes up a few times a second to ask whether to go on.
"""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")

_WAKE_SECONDS = 0.1


class WaitStopped(Exception):
    """A wait for data was given up because the run was asked to stop; nothing has been handed out."""


class Prefetcher(Generic[Item]):
    """`next()` gives make(0), make(1), ... in order; up to `ahead` items are made before they are asked for.

    What `make` raises comes out of the `next()` whose item it was, which leaves the position where it is: the next call tries
    again. With `ahead=0` there are no threads.
    """

    def __init__(self, make: Callable[[int], Item], *, ahead: int, threads: int):
        self._make = make
        self._ahead = ahead
        self._changed = threading.Condition()
        self._done: dict[int, tuple[Item | None, BaseException | None]] = {}
        self._first = 0  # the item that next() gives
        self._claimed = 0  # items below have been taken up by a thread
        self._failed = False  # the last next() raised what the making of its item had raised
        self._retry: int | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"mlt-data-{number}", daemon=True) for number in range(min(threads, ahead))
        ]
        for thread in self._threads:
            thread.start()

    def next(self, stop: Callable[[], object] | None = None) -> Item:
        """The next item. An item that is ready is handed out whatever `stop` says.

        Raises:
            WaitStopped: `stop()` is true and the item is not ready.
            RuntimeError: closed, before or during the wait.
        """
        if not self._threads:
            return self._make_now()
        with self._changed:
            if self._failed:
                self._failed, self._retry = False, self._first
                self._changed.notify_all()
            while self._first not in self._done:
                if self._closed:
                    raise RuntimeError("this loader is closed")
                if stop is not None and stop():
                    raise WaitStopped("asked to stop while waiting for a batch")
                self._changed.wait(_WAKE_SECONDS)
            item, error = self._done.pop(self._first)
            self._failed = error is not None
            if not self._failed:
                self._first += 1
                self._changed.notify_all()
        if error is not None:
            raise error
        return item  # pyright: ignore[reportReturnType]

    def close(self, timeout_seconds: float = 1.0) -> None:
        """Stops the threads and drops what they made. One that is stuck is left behind after the time-out."""
        with self._changed:
            self._closed = True
            self._done.clear()
            self._changed.notify_all()
        end = time.monotonic() + timeout_seconds
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))

    def _make_now(self) -> Item:
        if self._closed:
            raise RuntimeError("this loader is closed")
        item = self._make(self._first)
        self._first += 1
        return item

    def _work(self) -> None:
        while (index := self._claim()) is not None:
            try:
                result = (self._make(index), None)
            except BaseException as error:  # whatever it is belongs to the caller of next()
                result = (None, error)
            with self._changed:
                if self._closed:
                    return
                self._done[index] = result
                self._changed.notify_all()

    def _claim(self) -> int | None:
        """The next item to make, once there is room for it; None when closed."""
        with self._changed:
            while not self._closed:
                if self._retry is not None:
                    index, self._retry = self._retry, None
                    return index
                if self._claimed < self._first + self._ahead:
                    self._claimed += 1
                    return self._claimed - 1
                self._changed.wait()
        return None


def run_stoppable(work: Callable[[], Item], stop: Callable[[], object] | None = None) -> Item:
    """The result of `work()`, which runs in a thread of its own: the caller waits where signals reach it.

    Raises:
        WaitStopped: `stop()` became true first; the thread is left to itself.
    """
    one = Prefetcher(lambda index: work() if index == 0 else None, ahead=1, threads=1)
    try:
        return one.next(stop)  # pyright: ignore[reportReturnType]
    finally:
        one.close(timeout_seconds=0)
