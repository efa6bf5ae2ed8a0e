"""The sources of the Python that runs: real, long, structured text on every machine, with no download."""

import hashlib
import os
import platform
import string
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from mlt.config.problems import ABSENT, Problem
from mlt.data.sources import Documents, Source
from mlt.errors import UserError

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_INSTALLED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
# These describe the machine Python was built or installed on, not the library.
_LOCAL_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")
_WHITE_SPACE = b" \t\r\n\f"
_IDENTIFIER = (string.ascii_letters + "_").encode()


class PythonStdlib(Source):
    """The *.py files of the running interpreter's standard library, each content once, sorted by path.

    Installed packages, files that are not UTF-8 and data tables are left out. What is there depends on the
    interpreter, so losses compare only under the same corpus hash.

    Attributes:
        include_tests: also take the library's own tests, the larger half where they are installed.
        max_file_bytes: longer files are cut at the last line end before this size.
        max_bytes: take about this much at most, choosing files by the hash of their content; None takes all.
        max_symbol_share: leave out a file when more than this share of its bytes other than white space is
            neither an ASCII letter nor an underscore: tables of numbers and code points.
    """

    include_tests: bool = False
    max_file_bytes: Annotated[int, Field(ge=1)] = 256_000
    max_bytes: Annotated[int | None, Field(ge=1)] = None
    max_symbol_share: Annotated[float, Field(gt=0, le=1)] = 0.3

    def documents(self) -> Documents:
        """Reads the library into memory. Raises UserError if the interpreter came without sources."""
        root = stdlib_folder()
        found: dict[bytes, tuple[str, str]] = {}
        for name in self._file_names(root):
            text = self._text(root / name)
            if text:
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                found.setdefault(digest, (name, text))
        chosen = sorted(found[digest] for digest in self._within_budget(found))
        if not chosen:
            raise UserError(f"PythonStdlib: no usable *.py file under {root}; {_WITHOUT_SOURCES}")
        implementation = f"{platform.python_implementation()} {platform.python_version()}"
        texts = [text for _, text in chosen]
        return Documents(
            origin=f"the standard library of {implementation}",
            names=[name for name, _ in chosen],
            read=texts.__getitem__,
        )

    def file_problems(self) -> Iterable[Problem]:
        root = stdlib_folder()
        if not (root / "os.py").is_file():
            yield Problem("", ABSENT, f"there are no *.py files under {root}", _WITHOUT_SOURCES)

    @classmethod
    def example(cls) -> Self:
        return cls(max_bytes=200_000)

    def _file_names(self, root: Path) -> list[str]:
        """The files to look at, as sorted paths relative to the library with `/` between the parts."""
        left_out = _INSTALLED_FOLDERS if self.include_tests else _INSTALLED_FOLDERS | _TEST_FOLDERS
        names = []
        for parent, folders, files in os.walk(root):
            folders[:] = [folder for folder in folders if folder not in left_out]
            paths = [Path(parent, file) for file in files if file.endswith(".py") and not file.startswith(_LOCAL_FILES)]
            names += [path.relative_to(root).as_posix() for path in paths if not path.is_symlink()]
        return sorted(names)

    def _text(self, path: Path) -> str | None:
        try:
            data = path.read_bytes()
            data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        if len(data) > self.max_file_bytes:
            data = data[: self.max_file_bytes]
            data = data[: data.rfind(b"\n") + 1]
        visible = data.translate(None, delete=_WHITE_SPACE)
        symbols = len(visible.translate(None, delete=_IDENTIFIER))
        if symbols > self.max_symbol_share * len(visible):
            return None
        return data.decode("utf-8")

    def _within_budget(self, found: dict[bytes, tuple[str, str]]) -> list[bytes]:
        if self.max_bytes is None:
            return list(found)
        chosen, left = [], self.max_bytes
        # Not by the first half: its smallest values are the documents that are held out.
        for digest in sorted(found, key=lambda digest: digest[8:]):
            size = len(found[digest][1].encode())
            if size <= left:
                chosen.append(digest)
                left -= size
        return chosen


_WITHOUT_SOURCES = (
    "some embedded or stripped interpreters come without sources: use a full Python, or give your own text with "
    "TextFiles or JsonLines"
)


def stdlib_folder() -> Path:
    """The folder of the running interpreter's standard library, also from inside a virtual environment."""
    return Path(sysconfig.get_path("stdlib"))
