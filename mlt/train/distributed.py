"""Joining the processes of a run, and leaving them: before the first use of a device until the end of the command."""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mlt.config.dump import full_hash
from mlt.config.run import RunConfig
from mlt.errors import EXIT_FAILED, EXIT_LOST, EXIT_PREEMPTED, EXIT_USER, PeerLost, Preempted, UserError
from mlt.train.background import unfinished
from mlt.train.peers import ALONE, Alone, Peers, end_process
from mlt.train.processes import Processes

_NOTICE_SECONDS = 5.0  # from a failed collective to the word that a process died

_state: dict[str, Peers] = {}


@contextlib.contextmanager
def joined(processes: Processes | None, config: RunConfig) -> Iterator[Alone]:
    """Make this process one of `processes` for as long as the block lasts; None: it is the only one.

    A failure of a collective whose peer died becomes PeerLost, with the name of that process. Any other failure is told
    to the others, which end as well.

    Raises:
        UserError: the processes do not find together, see `Peers`.
        PeerLost: another process died.
    """
    if processes is None:
        yield ALONE
        return
    peers = initialize(processes, config)
    try:
        if jax.default_backend() == "cpu":
            # A program with collectives in a loop that comes out of the persistent cache waits for ever over gloo (JAX 0.10.2).
            jax.config.update("jax_enable_compilation_cache", False)
        yield peers
        peers.finish()
    except Preempted:
        peers.finish()
        raise
    except BaseException as error:
        verdict = peers.wait_for_verdict(_NOTICE_SECONDS if isinstance(error, (RuntimeError, ValueError)) else 0)
        if verdict is None or isinstance(error, UserError):
            code = EXIT_USER if isinstance(error, UserError) else EXIT_FAILED
            peers.leave(code, str(error) if code == EXIT_USER else f"{type(error).__name__}: {error}")
            raise
        if verdict.code == EXIT_LOST:
            raise PeerLost(verdict.text) from error
        raise UserError(verdict.text) from error


def initialize(processes: Processes, config: RunConfig) -> Peers:
    """Meet the other processes and start JAX's own service. Must come before the first use of a device.

    Raises:
        UserError: the processes do not find together, or JAX's service cannot start.
    """
    facts = {"config": full_hash(config), "jax": jax.__version__}
    train = config.train
    peers = Peers(processes, facts, start_seconds=train.start_timeout_seconds, silence_seconds=train.peer_timeout_seconds)
    _state["peers"] = peers
    _end_in_words(peers)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM; `Peers.stop_after` agrees instead
    try:
        jax.distributed.initialize(
            f"{processes.host}:{peers.jax_port}",
            processes.count,
            processes.index,
            local_device_ids=processes.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(train.start_timeout_seconds) + 1,
            # Ours comes first and in words; this one is for what ours cannot see.
            heartbeat_timeout_seconds=2 * int(train.peer_timeout_seconds) + 60,
        )
    except RuntimeError as error:
        raise UserError(f"process {processes.index} cannot start JAX's service for {processes.address}: {error}") from error
    return peers


def leave(code: int) -> NoReturn:
    """End the command.

    After a failure of one process, without the wait for all others that JAX adds to an exit; and while the compiler is still
    at work, which an exit of the interpreter would wait for or crash in, without that exit.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # a full disk behind it, or a reader that is gone: an exit would fail at it again
        os._exit(code)
    if (_state and code not in (0, EXIT_PREEMPTED)) or unfinished():
        os._exit(code)
    sys.exit(code)


def agree_on(name: str, digest: str) -> None:
    """Refuse to go on where a hexadecimal digest is not the same on all processes.

    Raises:
        UserError: it differs; raised on all of them.
    """
    if jax.process_count() == 1:
        return
    words = np.frombuffer(bytes.fromhex(digest), np.uint32)
    found = np.asarray(multihost_utils.process_allgather(words))
    other = [index for index in range(len(found)) if not np.array_equal(found[index], found[0])]
    if other:
        hosts = _state["peers"].hosts
        raise UserError(
            f"{name} is not the same on all processes: {', '.join(f'{i} on {hosts[i]}' for i in other)} differ from process 0 "
            f"on {hosts[0]}. Give all machines the same files and versions"
        )


def first_says(value: int) -> int:
    """Process 0's answer, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def anyone_says(value: bool) -> bool:
    """Whether any process says so, on every process."""
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.bool_(value))))


def meet(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _end_in_words(peers: Peers) -> None:
    """Let this process end with a message where JAX aborts it because process 0, and with it JAX's service, is gone.

    JAX offers no way to be told instead: the callback of its client cannot be a Python function (jaxlib 0.10 and 0.12).
    `abort` calls the handler in the thread that fails, so it may wait and take the interpreter's lock. An abort for any
    other reason goes its way, after the stacks of all threads.
    """
    libc = ctypes.CDLL(None)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)

    def on_abort(number: int) -> None:
        verdict = peers.wait_for_verdict(_NOTICE_SECONDS)
        if verdict is not None:
            end_process(verdict)
        faulthandler.dump_traceback(all_threads=True)
        libc.signal(number, None)  # SIG_DFL: abort goes on

    handler = kind(on_abort)
    _HANDLERS.append(handler)
    libc.signal(signal.SIGABRT, handler)


_HANDLERS: list[object] = []  # held for as long as the process lives
