"""Work in a thread of its own, so that the main thread can hear a request to stop while the compiler is deaf to it."""

import queue
import threading
from collections.abc import Callable
from typing import Any


class Task:
    """A call that another thread makes."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self._done = call, threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None

    def wait(self, seconds: float) -> bool:
        """Whether it is done, after at most so long."""
        return self._done.wait(seconds)

    def result(self) -> Any:
        """What it returned; waits for it, and raises what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value

    def run(self) -> None:
        """Make the call in this thread."""
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        self._done.set()


class Worker:
    """One thread that makes calls in order. It is a daemon: nobody waits for one that never ends."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Task] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def do(self, call: Callable[[], Any]) -> Task:
        """Make a call after those before it."""
        task = Task(call)
        _UNFINISHED.append(task)
        self._calls.put(task)
        return task

    def _work(self) -> None:
        while True:
            task = self._calls.get()
            task.run()
            _UNFINISHED.remove(task)


_UNFINISHED: list[Task] = []


def unfinished() -> bool:
    """Whether some call is still being made: an orderly exit of the interpreter would wait for it, or crash in it."""
    return bool(_UNFINISHED)
