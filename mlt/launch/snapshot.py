"""A copy of the code beside the run: what is edited while a job waits or trains changes none of its restarts."""

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlt.errors import UserError

_PACKAGES = ("mlt", "mlt_kernels")


def code_digest() -> str:
    """12 hex digits that stand for every file of the packages that are imported here."""
    total = hashlib.sha256()
    for name, file in _files():
        total.update(f"{name}\0{file.stat().st_size}\0".encode())
        total.update(file.read_bytes())
    return total.hexdigest()[:12]


def copy_code(target: Path) -> None:
    """Copy the packages to `target`, whole or not at all; one that is there already is kept.

    Raises:
        UserError: it cannot be written.
    """
    if target.is_dir():
        return
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for name, file in _files():
            copy = beside / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        beside.rename(target)
    except OSError as error:
        if not target.is_dir():
            raise UserError(
                f"the code cannot be copied to {target}: {error.strerror}; make room, or choose another --run-dir"
            ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _files() -> Iterator[tuple[str, Path]]:
    """(path inside the copy, file) of everything in the packages but byte code, in order."""
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"the package {package} is not installed as plain files, so no restart could run this code")
        root = Path(spec.submodule_search_locations[0])
        for file in sorted(root.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                yield str(Path(package, file.relative_to(root))), file
