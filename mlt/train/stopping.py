"""Requests to stop as the loop meets them: the points at which all processes agree, and waits that a request ends."""

import itertools
from collections.abc import Callable

from mlt.errors import Preempted
from mlt.train.background import Task
from mlt.train.peers import Alone
from mlt.train.signals import StopRequest

_POLL_SECONDS = 0.1  # how often a wait looks for a request to stop


class StoppedEarly(Exception):
    """Work between two steps was given up because the run is to stop."""


class Stopping:
    """One process's view of whether the run is to stop.

    Attributes:
        name: the request that the run stops for, such as "SIGTERM", once all processes agree; None until then.
    """

    def __init__(self, request: StopRequest, peers: Alone) -> None:
        self._request, self._peers = request, peers
        self._points = itertools.count()
        self.name: str | None = None

    @property
    def while_loading(self) -> Callable[[], object] | None:
        """What ends a wait for data. With several processes a request waits for the batch: the others may be in its step."""
        return (lambda: self._request.name) if self._peers.count == 1 else None

    def heed(self) -> None:
        """Stop for the request that ended a wait for data."""
        self.name = self._request.name

    def pass_point(self) -> None:
        """Where all processes come by in the same order, and so may agree to stop."""
        self.name = self.name or self._peers.stop_after(next(self._points), self._request.name)

    def give_up_if_asked(self) -> None:
        """Pass a point in the middle of some work.

        Raises:
            StoppedEarly: the run is to stop.
        """
        self.pass_point()
        if self.name is not None:
            raise StoppedEarly

    def wait_before_start(self, task: Task) -> bool:
        """Wait for the compiler before the first point; False where the run is to stop before that."""
        while not task.wait(_POLL_SECONDS):
            self.name = self._peers.stop_before_start(self._request.name)
            if self.name is not None:
                return False
        return True

    def wait(self, task: Task) -> None:
        """Wait for the compiler between steps.

        Raises:
            StoppedEarly: the run is to stop. Only where this is its only process: others may be done and beyond this point.
        """
        while not task.wait(_POLL_SECONDS):
            if self._peers.count == 1:
                self.give_up_if_asked()
        task.result()

    def preempted(self, what: str) -> Preempted:
        """The end of the process on request, to be raised."""
        return Preempted(f"{self.name}: {what}; the same command resumes")
