"""The second level: copies of committed steps in a place that outlives the machine.

    <durable_path>/<run>/<step>/state|data|meta/...     the same files as locally
    <durable_path>/<run>/<step>/manifest.json           size and check sum of each; written last, so it commits the copy

A step without a manifest does not count. A copy that proves damaged loses its manifest and keeps its files.
"""

import contextlib
import json
import zlib
from pathlib import Path
from typing import Any

from mlt.checkpoint.layout import StepFiles, damaged
from mlt.checkpoint.stores import Folder, StoredFile, open_store

MANIFEST = "manifest.json"
SET_ASIDE = "manifest.damaged.json"
_FORMAT = 1
_NOTE = "durable"


class Durable:
    """Committed copies of steps in a directory or an object store. Every method raises OSError where the place fails."""

    def __init__(self, place: str | Path) -> None:
        self._store = open_store(place)
        self.url = self._store.url

    def steps(self) -> list[int]:
        """List the committed steps in ascending order."""
        return sorted(step for step, names in self.listing().items() if MANIFEST in names)

    def listing(self) -> dict[int, list[str]]:
        """Every step that has files, with their names below the step."""
        found: dict[int, list[str]] = {}
        for name in self._store.names():
            step, _, rest = name.partition("/")
            if rest and step.isascii() and step.isdigit():
                found.setdefault(int(step), []).append(rest)
        return found

    def files(self, step: int) -> StepFiles:
        """The files of one step."""
        return StepFiles(
            step,
            f"{self.url}/{step}",
            lambda name: self._store.read(f"{step}/{name}"),
            lambda name: self._store.driver(f"{step}/{name}"),
        )

    def copy(self, step: int, source: Path) -> int:
        """Copy a committed local step, read the copy again, and commit it.

        A step that is there with the same state stays as it is; one with another state, as a run leaves that went back
        and took another course, is replaced.

        Returns:
          The bytes copied; 0 where it was there.

        Raises:
          OSError: a file cannot be read or written, or reads back differently. Nothing is committed then.
        """
        record = (source / "meta" / "metadata").read_bytes()
        with contextlib.suppress(FileNotFoundError):
            self._store.read(f"{step}/{MANIFEST}")
            if self._same_state(step, record):
                return 0
        self.delete(step)
        files: dict[str, StoredFile] = {}
        try:
            for path in sorted(path for path in source.rglob("*") if path.is_file()):
                name = path.relative_to(source).as_posix()
                files[name] = self._store.put(f"{step}/{name}", path)
            for name, file in files.items():
                if self._store.check(f"{step}/{name}") != file:
                    raise OSError(5, f"{step}/{name} reads back differently from what was written", self.url)
            body = {"format": _FORMAT, "step": step, "files": {name: list(file) for name, file in files.items()}}
            self._store.write(f"{step}/{MANIFEST}", json.dumps({**body, "crc32": _crc32(body)}, indent=1).encode())
        except OSError:
            with contextlib.suppress(OSError):
                self.delete(step)
            raise
        return sum(file.size for file in files.values())

    def manifest(self, step: int) -> dict[str, StoredFile]:
        """The table of files of a committed step.

        Raises:
          CheckpointError: it is missing or altered.
        """
        name = f"{self.url}/{step}"
        try:
            content = json.loads(self._store.read(f"{step}/{MANIFEST}"))
            body = {key: content[key] for key in ("format", "step", "files")}
            if content["crc32"] != _crc32(body) or body["step"] != step:
                raise damaged(name, f"the contents of {MANIFEST} were altered")
            return {file: StoredFile(*entry) for file, entry in body["files"].items()}
        except OSError as error:
            raise damaged(name, f"cannot read {MANIFEST}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(name, f"{MANIFEST} is cut off or altered") from error

    def check_files(self, step: int) -> None:
        """Read every file of a committed step again and compare it with the manifest.

        Raises:
          CheckpointError: a file is missing or differs.
        """
        for name, file in self.manifest(step).items():
            try:
                found = self._store.check(f"{step}/{name}")
            except OSError as error:
                raise damaged(f"{self.url}/{step}", f"cannot read {name}: {error.strerror}") from error
            if found != file:
                raise damaged(f"{self.url}/{step}", f"{name} has {found.size:,} bytes that are not those that were copied")

    def set_aside(self, step: int) -> None:
        """Take a damaged step out of the count; its files stay until the step is copied again."""
        with contextlib.suppress(FileNotFoundError):
            self._store.write(f"{step}/{SET_ASIDE}", self._store.read(f"{step}/{MANIFEST}"))
        self._store.delete(f"{step}/{MANIFEST}")

    def delete(self, step: int) -> None:
        """Delete a step, its manifest first: a half deleted one does not count."""
        self._store.delete(f"{step}/{MANIFEST}")
        self._store.delete(f"{step}/")

    def _same_state(self, step: int, record: bytes) -> bool:
        """Whether the copy that is there has the arrays of this record."""
        try:
            there: Any = json.loads(self._store.read(f"{step}/meta/metadata"))
            return there["leaves"] == json.loads(record)["leaves"]
        except (OSError, ValueError, KeyError, TypeError):
            return False


def remember(directory: Path, durable: Durable) -> None:
    """Note in a checkpoint directory where its durable copies are, for the commands that read it.

    Raises:
      OSError: it cannot be written.
    """
    path = directory / _NOTE
    if not path.exists() or path.read_text().strip() != durable.url:
        Folder(directory).write(_NOTE, f"{durable.url}\n".encode())


def remembered(directory: Path) -> Durable | None:
    """The durable place that a checkpoint directory names, if it names one."""
    try:
        return Durable((directory / _NOTE).read_text().strip())
    except OSError:
        return None


def _crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
