"""Orbax's way to write arrays, but for a write that fails: the others are waited for before the failure is told.

Orbax writes in event loops of its own and closes one as soon as a write in it fails. TensorStore then reports every write
that was still under way to a closed loop, each with a traceback on the terminal, and the next save may meet their files.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp


class PatientArrays(ocp.type_handlers.ArrayHandler):
    """Writes as its base class does, in event loops that close when nothing is under way in them any more."""

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Any:
        """See the base class."""
        return await super().serialize(values, [_followed(info) for info in infos], args)


def _followed(info: Any) -> Any:
    """What Orbax knows of an array. A write asks it first, in its own loop, whether the directory is there."""
    created = getattr(info, "await_path_creation", None)
    if created is not None:

        async def await_path_creation() -> Any:
            _close_when_done(asyncio.get_running_loop())
            return await created()

        info.await_path_creation = await_path_creation
    return info


def _close_when_done(loop: Any) -> None:
    if "close" in vars(loop):
        return  # seen before
    close = loop.close

    def close_when_done() -> None:
        while left := asyncio.all_tasks(loop):
            loop.run_until_complete(asyncio.wait(left))
        close()

    loop.close = close_when_done
