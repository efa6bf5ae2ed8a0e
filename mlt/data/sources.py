"""What a data source is: a config that opens a deterministic, random-access collection of documents."""

import glob
import importlib.util
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Self

from mlt.config.base import Config
from mlt.config.problems import ABSENT, ConfigError, Problem
from mlt.errors import UserError


class BadRecord(UserError):
    """One document cannot be read as text, whichever host reads it. The message starts with its file and position.

    `max_bad_records` of them are left out; a file that cannot be opened is no bad record.
    """


@dataclass(frozen=True)
class ClusterField:
    """A field of a source's records that holds the cluster of the document.

    Attributes:
        name: what messages call it, such as `field 'leaf'`.
        read: index -> text and the value of the field as the file has it, in one read; raises like `Documents.read`.
    """

    name: str
    read: Callable[[int], tuple[str, Any]]


@dataclass(frozen=True)
class Documents:
    """Documents in a fixed order; `documents[i]` reads the text of document i.

    Attributes:
        origin: where they come from, as it continues the words "read N documents from".
        names: one name per document, unique: file and position.
        read: index -> text; raises BadRecord when the document is not text, UserError when the file cannot be read.
        clusters: the field with each document's cluster; None where the source names none.
    """

    origin: str
    names: Sequence[str]
    read: Callable[[int], str]
    clusters: ClusterField | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str:
        return self.read(index)

    def __iter__(self) -> Iterator[str]:
        return (self.read(index) for index in range(len(self)))


class Source(Config, ABC):
    """A collection of documents. One source a file; a subclass needs the three methods below."""

    cluster_setting: ClassVar[str | None] = None
    """The setting that names the field of a record with the document's cluster, in sources whose records have fields."""

    @property
    def names_clusters(self) -> bool:
        """Whether its records bring the clusters of their documents."""
        return self.cluster_setting is not None and getattr(self, self.cluster_setting) is not None

    @abstractmethod
    def documents(self) -> Documents:
        """Opens the collection. Raises UserError if there is nothing to read or it cannot be read."""

    @abstractmethod
    def file_problems(self) -> Iterable[Problem]:
        """What is wrong with the files this source names, found without reading them, with paths relative to it."""

    @classmethod
    @abstractmethod
    def example(cls) -> Self:
        """A small instance, for tests and documentation."""


def find_files(paths: Sequence[str], suffixes: tuple[str, ...] = ("",)) -> tuple[list[str], list[Problem]]:
    """Expands files, folders (every file below, hidden ones left out) and patterns such as `books/**/*.txt`.

    `suffixes` says which of the files below a folder are meant. Returns the files (in the order of `paths`, sorted within each,
    no file twice) and the problems of `paths`.
    """
    found: dict[str, None] = {}
    problems = []
    for position, entry in enumerate(paths):
        path = os.path.normpath(os.path.expanduser(entry))
        if os.path.isdir(path):
            matches = [match for match in _files_below(path) if match.endswith(suffixes)]
            reason = f"is a folder with no {' or '.join(filter(None, suffixes)) or 'file'} in it"
        elif glob.has_magic(path) and not os.path.exists(path):
            matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
            reason = "matches no file"
        else:
            matches = [path] if os.path.isfile(path) else []
            reason = "does not exist"
        if not matches:
            ways_out = "give an existing file, a folder, or a pattern such as 'books/**/*.txt'"
            problems.append(Problem(f"paths[{position}]", entry, f"{reason}, looked for from {os.getcwd()}", ways_out))
        found.update(dict.fromkeys(matches))
    return list(found), problems


def require_files(paths: Sequence[str], source: str, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """find_files, but every problem is raised in one ConfigError, as found in `source`."""
    files, problems = find_files(paths, suffixes)
    if problems:
        raise ConfigError(problems, source)
    return files


class Positions(Sequence[str]):
    """Names of documents that lie in files one after another, `file:position` from 0; finds them by bisection."""

    def __init__(self, files: Sequence[str], counts: Sequence[int]):
        self._files = files
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, document: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        file, position = self.place(document)
        return f"{self._files[file]}:{position}"

    def place(self, document: int) -> tuple[int, int]:
        """Index of the file, and position in it."""
        if not 0 <= document < len(self):
            raise IndexError(document)
        file = bisect_right(self._ends, document)
        return file, document - (self._ends[file - 1] if file else 0)


def require_package(name: str, purpose: str) -> None:
    """Raises UserError if an optional package is not installed."""
    problem = package_problem(name, purpose)
    if problem is not None:
        raise UserError(str(problem))


def package_problem(name: str, purpose: str) -> Problem | None:
    """What is wrong if an optional package is not installed."""
    if importlib.util.find_spec(name) is not None:
        return None
    return Problem("", ABSENT, f"{purpose} needs the package {name}, which is not installed", f"run: pip install {name}")


def read_bytes(path: str) -> bytes:
    """The bytes of a file, or a UserError that names it."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Check the path and its permissions.") from error


def decode_utf8(data: bytes, path: str, first_byte: int = 0) -> str:
    """Text of `data`, which starts at byte `first_byte` of `path`; BadRecord with the place if not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"{path}: not UTF-8 at byte {first_byte + error.start} (value 0x{data[error.start]:02x}, "
            f"{error.reason}). Documents must be UTF-8 text: convert the file (for instance with iconv) or "
            "take it out of the paths."
        ) from error


def _files_below(folder: str) -> list[str]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in files if os.path.isfile(path))
