"""How the processes of a run meet: all others report to process 0, which lets them start once all are there and fit."""

import asyncio
import dataclasses
import json
import socket
from collections.abc import Mapping
from typing import Any

from mlt.errors import UserError
from mlt.train.processes import Processes

_HELLO_SECONDS = 10.0  # for a connection to say who it is
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Link:
    """A connection that carries one JSON object a line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, message: Mapping[str, Any]) -> None:
        """Send without waiting; a connection that has ended takes it and loses it."""
        if not self.ended() and not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None where the connection has ended, or something that is none of us speaks on it."""
        try:
            message = json.loads(await self._reader.readline())
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def ended(self) -> bool:
        return self._reader.at_eof()

    def close(self) -> None:
        self._writer.close()


@dataclasses.dataclass(frozen=True)
class Roll:
    """Who came.

    Attributes:
        links: process index -> connection: process 0 has one to each other, the others one to process 0.
        hosts: machine of each process.
        jax_port: where JAX's own service is to listen on the machine of process 0.
    """

    links: dict[int, Link]
    hosts: list[str]
    jax_port: int


async def gather(processes: Processes, facts: Mapping[str, str], seconds: float) -> Roll:
    """Process 0: wait for all others, and let them start.

    Args:
        processes: where to listen, and how many there are.
        facts: "host", and what must be the same on all processes.
        seconds: time limit.

    Raises:
        UserError: not all came in time, or one does not fit; those that came are told the same.
    """
    links: dict[int, Link] = {}
    hosts = {0: facts["host"]}
    complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(reader, writer)
        try:
            hello = await asyncio.wait_for(link.receive(), _HELLO_SECONDS)
        except TimeoutError:
            hello = None
        if hello is None or complete.done() or not isinstance(hello.get("process"), int):
            link.close()
            return
        problem = _misfit(hello, processes, facts)
        index = hello["process"]
        if problem is None and index in links and not links[index].ended():
            problem = f"two processes say that they are process {index}: one on {hosts[index]}, one on {hello['host']}"
        if problem is not None:
            link.send({"kind": "refused", "text": problem})
            complete.set_exception(UserError(problem))
            return
        links[index], hosts[index] = link, hello["host"]
        if len(links) == processes.count - 1:
            complete.set_result(None)

    where = processes.host if processes.host in _LOOPBACK else None
    try:
        server = await asyncio.start_server(welcome, where, processes.port)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {processes.address}: {error.strerror}; give a free port of this machine as coordinator"
        ) from error
    try:
        await asyncio.wait_for(complete, seconds)
    except (TimeoutError, UserError) as error:
        missing = [index for index in range(1, processes.count) if index not in links]
        text = str(error) or (
            f"of {processes.count} processes, {', '.join(map(str, missing))} did not report to process 0 at "
            f"{processes.address} within {seconds:g} s; start them, correct the number of processes, or raise "
            "train.start_timeout_seconds"
        )
        for link in links.values():
            link.send({"kind": "refused", "text": text})
        raise UserError(text) from None
    finally:
        server.close()
    roll = Roll(links, [hosts[index] for index in range(processes.count)], _free_port())
    for link in links.values():
        link.send({"kind": "start", "hosts": roll.hosts, "jax_port": roll.jax_port})
    return roll


async def report(processes: Processes, facts: Mapping[str, str], seconds: float) -> Roll:
    """Any other process: report to process 0 and wait until all have.

    Raises:
        UserError: process 0 cannot be reached in time, or refuses.
    """
    now = asyncio.get_running_loop().time
    end, last = now() + seconds, "no answer"
    while now() < end:
        try:
            limit = max(0.1, min(5.0, end - now()))
            link = Link(*await asyncio.wait_for(asyncio.open_connection(processes.host, processes.port), limit))
        except (OSError, TimeoutError) as error:
            last = getattr(error, "strerror", None) or last
            await asyncio.sleep(0.2)
            continue
        link.send({"process": processes.index, "count": processes.count, **facts})
        try:
            # Process 0 may have begun to count the seconds later; its answer says who is missing.
            reply = await asyncio.wait_for(link.receive(), seconds + 5)
        except TimeoutError:
            reply = None
        match reply:
            case {"kind": "start", "hosts": list(hosts), "jax_port": int(port)}:
                return Roll({0: link}, hosts, port)
            case {"kind": "refused", "text": str(text)}:
                raise UserError(text)
        last = "it closed the connection"
        link.close()
        await asyncio.sleep(0.2)
    raise UserError(
        f"process {processes.index} of {processes.count} cannot reach process 0 at {processes.address} within {seconds:g} s "
        f"({last}); start process 0 there, correct the coordinator's address, open the port, or raise "
        "train.start_timeout_seconds"
    )


def _misfit(hello: Mapping[str, Any], processes: Processes, facts: Mapping[str, str]) -> str | None:
    """Why a process cannot take part, if so."""
    index, count, host = hello["process"], hello.get("count"), hello.get("host")
    who = f"process {index} on {host}"
    if count != processes.count:
        return (
            f"{who} was told of {count} processes, process 0 on {facts['host']} of {processes.count}; give all of them the "
            "same number"
        )
    if not 0 < index < processes.count:
        return f"{who}: the others of {processes.count} processes are 1 to {processes.count - 1}"
    for name, value in facts.items():
        if name != "host" and hello.get(name) != value:
            return f"{who} has {name} {hello.get(name)}, process 0 on {facts['host']} has {value}; they must be the same"
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
