"""The run directory: made or refused before anything is written, held by one process, of one config."""

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from mlt.errors import UserError
from mlt.run_paths import RunPaths, write_whole

LOGGER = logging.getLogger("mlt.train")
_SHOWN = 20  # lines of a config difference that are printed
# What may lie in a directory that no run has started in: a launcher's files, a mounted disk's.
_HARMLESS = ("run.lock", "logs", "plan.txt", "lost+found")
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class RunDirectory(RunPaths):
    """One run's directory.

    In a run of several processes all of them go through the same calls; only the first writes and holds the lock.

    Attributes:
        begun: whether the run that holds the directory takes steps, or has made something else to keep.
    """

    begun = False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Make the directory if need be and hold it against every other process for as long as the block lasts.

        The lock is the kernel's: it ends with the process, however that ends, so none is ever stale. A directory that was
        made here is removed again where no file was written in it, and with everything in it where the block refuses the
        run before it has `begun`: another config can then have its place.

        Raises:
          UserError: the path is a file, cannot be made or written, holds files of something else, or is in use.
        """
        if jax.process_index() != 0:
            yield
            return
        made, self.begun, refused = self._missing(), False, False
        try:
            self._create()
            descriptor = self._take_lock()
            try:
                yield
            except UserError:
                refused = not self.begun
                raise
            finally:
                if made and (refused or self._is_unused()):
                    shutil.rmtree(self.path, ignore_errors=True)
                os.close(descriptor)
        finally:
            for folder in made:
                with contextlib.suppress(OSError):  # it is in use, or gone
                    folder.rmdir()

    def check_config(self, text: str, difference: Callable[[str, str], list[str]]) -> bool:
        """Compare a config with the one this directory was started with.

        Args:
          text: the YAML of the config at hand.
          difference: called with the saved and the new YAML, gives one line for each difference.

        Returns:
          True where the directory holds this config already, False where it holds none.

        Raises:
          UserError: it holds another config; the message shows the difference.
        """
        try:
            saved = self.config_path.read_text()
        except FileNotFoundError:
            return False
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(
                f"cannot read {self.config_path}: {reason}; change its rights, put a copy back, or choose another --run-dir"
            ) from error
        lines = [] if saved == text else difference(saved, text)
        if not lines:
            return True
        more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        shown = "\n".join(f"  {line}" for line in lines[:_SHOWN] + more)
        raise UserError(
            f"{self.path} was started with another config (saved -> given):\n{shown}\nA run keeps its config. To go on "
            f"with it, train {self.config_path}; to train the new config, choose another --run-dir"
        )

    def write_config(self, text: str) -> None:
        """Save the config, whole or not at all; one that is there already stays as it is.

        Raises:
          UserError: it cannot be written.
        """
        if jax.process_index() == 0 and not self.config_path.exists():
            try:
                write_whole(self.config_path, text)
            except OSError as error:
                raise UserError(
                    f"cannot write {self.config_path}: {error.strerror}; free space, or choose another --run-dir"
                ) from error

    def _missing(self) -> list[Path]:
        """The directory and those above it that are not there yet, innermost first."""
        folders = (self.path, *self.path.parents)
        return list(itertools.takewhile(lambda folder: not os.path.exists(folder), folders))

    def _is_unused(self) -> bool:
        """Whether the lock is the only file there is."""
        return [path for path in self.path.rglob("*") if not path.is_dir()] == [self.lock_path]

    def _create(self) -> None:
        """Make the directory, or refuse what is there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = sorted(os.listdir(self.path))
        except (FileExistsError, NotADirectoryError):
            file = next(path for path in (self.path, *self.path.parents) if os.path.exists(path))
            raise UserError(f"run directory {self.path}: {file} is not a directory; choose another path") from None
        except OSError as error:
            raise UserError(
                f"run directory {self.path} cannot be made or read: {error.strerror}; change the rights of the directory above "
                "it, or choose another --run-dir"
            ) from error
        foreign = [name for name in names if name not in _HARMLESS and not name.startswith(".")]
        if foreign and self.config_path.name not in names:
            shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
            raise UserError(
                f"{self.path} is not a run directory: it has no config.yaml but holds {shown}. Nothing was written. "
                "Choose a new or empty directory; if it was a run, put its config.yaml back"
            )
        self._probe()

    def _probe(self) -> None:
        """Write, sync and delete a few bytes: rights, quotas and full disks show now and not after an hour."""
        probe = self.path / f".probe.{os.getpid()}"
        try:
            write_whole(probe, "x" * 4096)
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"run directory {self.path} cannot be written: {error.strerror}; free space, change the rights or "
                "choose another --run-dir"
            ) from error

    def _take_lock(self) -> int:
        while True:
            try:
                descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise self._unlockable(error) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(descriptor, 4096, 0)
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UserError(self._in_use(holder)) from None
                if error.errno not in _NO_LOCKS:
                    raise self._unlockable(error) from error
                LOGGER.warning("%s: this file system has no locks; see to it that no other run writes here", self.path)
                descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CLOEXEC)
            if self._is_current(descriptor):
                break
            os.close(descriptor)  # its holder removed the file between our open and our lock
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(note).encode(), 0)
        return descriptor

    def _unlockable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot lock {self.lock_path}: {error.strerror}; change its rights or move it away, or choose another --run-dir"
        )

    def _is_current(self, descriptor: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), os.stat(self.lock_path))
        return False

    def _in_use(self, holder: bytes) -> str:
        try:
            note = json.loads(holder)
            who = f"by process {note['pid']} on {note['host']} since {note['since']}"
        except (ValueError, KeyError, TypeError):
            who = "by another process"
        return f"run directory in use: {self.path} is held {who}; wait for it, stop it, or choose another --run-dir"
