"""What the processes of a run tell each other beside their arrays: I am alive, stop after step n, I leave.

Process 0 holds one connection to every other process. JAX's own service ends a process with SIGABRT when a peer is
missing, dead or one too many; here the same is found out first and said in words. The end of a connection tells at
once that a process died; silence on it, that its machine is gone or hangs.
"""

import asyncio
import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mlt.errors import EXIT_LOST, EXIT_USER
from mlt.train.processes import Processes
from mlt.train.rendezvous import Link, gather, report

_NOT_STARTED = -1  # the point of a process that still compiles
GRACE_SECONDS = 2.0  # for the main thread to end by itself, before a verdict ends the process

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why this process cannot go on: exit code and message."""

    code: int
    text: str


def end_process(verdict: Verdict) -> None:
    """End this process at once: its main thread may be waiting for a peer that never answers."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{show_cursor}mlt: {verdict.text}\n")
    sys.stderr.flush()
    os._exit(verdict.code)


class Alone:
    """The only process of a run."""

    index, count = 0, 1

    def stop_after(self, point: int, asked: str | None) -> str | None:
        """Name of the request to stop, if the run is to stop at this point."""
        return asked

    def stop_before_start(self, asked: str | None) -> str | None:
        """Name of the request to stop, if the run is to stop before its first point."""
        return asked

    def wait_for_verdict(self, seconds: float) -> Verdict | None:
        """There is nobody to lose."""
        return None

    def finish(self) -> None:
        """Nobody waits."""

    def leave(self, code: int, reason: str) -> None:
        """Nobody is told."""


ALONE = Alone()


class Peers(Alone):
    """All processes of a run as one of them sees them. The methods of `Alone` are the main thread's, the rest a thread's."""

    def __init__(
        self,
        processes: Processes,
        facts: Mapping[str, str],
        *,
        start_seconds: float,
        silence_seconds: float,
        end: Callable[[Verdict], None] = end_process,
    ) -> None:
        """Meet the others.

        Args:
          processes: where, how many, which.
          facts: what must be the same on all of them, name -> value.
          start_seconds: how long to wait for all of them.
          silence_seconds: a process that says nothing for so long is lost.
          end: what a verdict does after its grace.

        Raises:
          UserError: they did not all come in time, do not fit together, or there is no way to process 0.
        """
        self.index, self.count = processes.index, processes.count
        self.hosts: list[str] = []
        self.jax_port = 0
        self._silence, self._end = silence_seconds, end
        self._change = threading.Condition()  # guards what both threads use
        self._verdict: Verdict | None = None
        self._step, self._held, self._finished, self._main_ends, self._asked = _NOT_STARTED, False, False, False, False
        self._decision: tuple[int, str] | None = None
        self._loop = asyncio.new_event_loop()
        self._links: dict[int, Link] = {}
        self._quiet: dict[int, float] = {}  # seconds since a process was heard
        self._tasks: list[asyncio.Task[None]] = []
        # What only process 0 keeps.
        self._request: str | None = None
        self._steps: dict[int, int] = {}
        self._done: set[int] = set()
        threading.Thread(target=self._loop.run_forever, name="mlt-peers", daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._meet(processes, facts, start_seconds), self._loop).result()

    def stop_after(self, point: int, asked: str | None) -> str | None:
        """Name of the request to stop, if all processes are to stop at this point; call it once at every one.

        Points are what all processes come by in the same order: the start, every step, every batch of an evaluation. A
        request asks every process how far it is and holds it there until the answer: one point more than the furthest.
        Without a request nothing is sent and nothing waits.

        Args:
          point: its number, ascending from 0; that of a step is passed when the step has been handed to the devices.
          asked: the request that reached this process itself, if any.
        """
        with self._change:
            self._ask(asked)
            self._change.wait_for(lambda: not self._held)
            self._step = point
            return self._decision[1] if self._decision is not None and point >= self._decision[0] else None

    def stop_before_start(self, asked: str | None) -> str | None:
        """Name of the request to stop, once it is settled that no process goes beyond point 0; never waits.

        For a process that compiles, as often as it likes: where one has passed point 0 already, this one has to follow.
        """
        with self._change:
            self._ask(asked)
            return self._decision[1] if self._decision is not None and self._decision[0] <= 0 else None

    def wait_for_verdict(self, seconds: float) -> Verdict | None:
        """Why this process cannot go on, once that is known; whoever asks and gets an answer ends the process."""
        with self._change:
            self._change.wait_for(lambda: self._verdict is not None, seconds)
            self._main_ends = self._main_ends or self._verdict is not None
            return self._verdict

    def finish(self) -> None:
        """Wait until every process is done."""
        self._loop.call_soon_threadsafe(self._tell_first, {"kind": "done"})
        with self._change:
            self._change.wait_for(lambda: self._finished)

    def leave(self, code: int, reason: str) -> None:
        """Tell the others that this process ends with a failure."""
        asyncio.run_coroutine_threadsafe(self._part(code, reason), self._loop).result()

    def _ask(self, asked: str | None) -> None:
        if asked is not None and not self._asked:
            self._asked = True
            self._loop.call_soon_threadsafe(self._tell_first, {"kind": "stop", "name": asked})

    async def _meet(self, processes: Processes, facts: Mapping[str, str], seconds: float) -> None:
        meet = gather if self.index == 0 else report
        roll = await meet(processes, {**facts, "host": socket.gethostname()}, seconds)
        self.hosts, self.jax_port, self._links = roll.hosts, roll.jax_port, roll.links
        self._quiet = dict.fromkeys(self._links, 0.0)
        work = [self._listen(index, link) for index, link in self._links.items()]
        self._tasks = [self._loop.create_task(part) for part in (*work, self._pulse())]

    async def _listen(self, index: int, link: Link) -> None:
        while (message := await link.receive()) is not None:
            self._quiet[index] = 0.0
            if self.index == 0:
                self._judge(index, message)
            else:
                self._obey(message)
        if index not in self._done:
            self._lose(index, "its connection ended without a word: it was killed, ran out of memory, or its machine went down")

    async def _pulse(self) -> None:
        """Say that this process lives, and count the silence of those it hears."""
        interval = min(10.0, self._silence / 8)
        last = time.monotonic()
        while True:
            await asyncio.sleep(interval)
            # The time for which this very process is stopped is nobody's silence.
            passed, last = min(time.monotonic() - last, 2 * interval), time.monotonic()
            for index, link in self._links.items():
                link.send({"kind": "alive"})
                self._quiet[index] += passed
                if self._quiet[index] > self._silence:
                    self._lose(index, f"nothing was heard of it for {self._silence:g} s: it hangs, or its network is down")

    def _judge(self, index: int, message: Message) -> None:
        """What process 0 makes of a message."""
        match message:
            case {"kind": "stop", "name": str(name)} if self._request is None:
                self._request = name
                self._tell_all({"kind": "how far"})
            case {"kind": "at", "step": int(step)}:
                self._steps[index] = step
                if len(self._steps) == self.count:
                    self._tell_all({"kind": "stop after", "step": max(self._steps.values()) + 1, "name": self._request})
            case {"kind": "done"}:
                self._done.add(index)
                if len(self._done) == self.count:
                    self._tell_all({"kind": "finished"})
            case {"kind": "left", "code": int(code), "reason": str(reason)}:
                self._done.add(index)
                self._tell_all(self._departure(index, code, reason))

    def _obey(self, message: Message) -> None:
        """What every process makes of a message of process 0."""
        match message:
            case {"kind": "how far"}:
                with self._change:
                    self._held = True
                    step = self._step
                self._tell_first({"kind": "at", "step": step})
            case {"kind": "stop after", "step": int(step), "name": str(name)}:
                with self._change:
                    self._decision, self._held = (step, name), False
                    self._change.notify_all()
            case {"kind": "finished"}:
                with self._change:
                    self._finished = True
                    self._change.notify_all()
            case {"kind": "verdict", "code": int(code), "text": str(text)}:
                self._accept(Verdict(code, text))

    def _tell_first(self, message: Message) -> None:
        if self.index == 0:
            self._judge(0, message)
        else:
            self._links[0].send(message)

    def _tell_all(self, message: Message) -> None:
        for link in self._links.values():
            link.send(message)
        self._obey(message)

    def _lose(self, index: int, why: str) -> None:
        if self._finished or self._verdict is not None:
            return
        verdict = self._loss(index, why)
        if self.index == 0:
            self._tell_all(verdict)
        else:
            self._obey(verdict)

    def _loss(self, index: int, why: str) -> Message:
        text = f"lost process {index} of {self.count} on {self.hosts[index]}: {why}; the same command on all machines resumes"
        return {"kind": "verdict", "code": EXIT_LOST, "text": text}

    def _departure(self, index: int, code: int, reason: str) -> Message:
        """A wrong input ends all processes alike; any other failure of one is a loss to the others."""
        if code == EXIT_USER:
            return {"kind": "verdict", "code": code, "text": f"process {index} of {self.count} on {self.hosts[index]}: {reason}"}
        return self._loss(index, f"it ended with exit code {code}: {reason}")

    async def _part(self, code: int, reason: str) -> None:
        if self.index == 0:
            for link in self._links.values():
                link.send(self._departure(0, code, reason))
        else:
            self._links[0].send({"kind": "left", "code": code, "reason": reason})
        await asyncio.sleep(0.2)  # the process is gone the next moment

    def _accept(self, verdict: Verdict) -> None:
        with self._change:
            if self._verdict is not None or self._finished:
                return
            self._verdict = verdict
            self._change.notify_all()
        self._loop.call_later(GRACE_SECONDS, self._conclude, verdict)

    def _conclude(self, verdict: Verdict) -> None:
        if self._main_ends:
            self._loop.call_later(5 * GRACE_SECONDS, self._end, verdict)
        else:
            self._end(verdict)
