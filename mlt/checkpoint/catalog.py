"""What checkpoints there are, at both levels, in which state: read from the files, no device and no model needed."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from mlt.checkpoint.durable import MANIFEST, SET_ASIDE, Durable, remembered
from mlt.checkpoint.layout import (
    CheckpointError,
    Record,
    StepFiles,
    Unreadable,
    committed_steps,
    read_record,
    step_files,
    unfinished,
)
from mlt.errors import UserError

_SET_ASIDE_NAME = re.compile(r"(\d+)\.damaged(-\d+)?")
_LEFT_OVER_NAME = re.compile(r"(\d+)\.(orbax-checkpoint-tmp|deleted).*")


COUNTED = ("committed", "damaged", "unreadable", "newer format")
"""States of what was committed once."""


class Entry(NamedTuple):
    """One checkpoint.

    Attributes:
      step: its number.
      level: local or durable.
      state: committed, damaged, unreadable, newer format, unfinished or set aside.
      size: bytes of its files.
      saved: seconds since the epoch; None where it is not known.
      files: where to read it.
      reason: why it is damaged.
    """

    step: int
    level: str
    state: str
    size: int
    saved: float | None
    files: StepFiles
    reason: str = ""


class Catalog(NamedTuple):
    """Where the checkpoints of a run are.

    Attributes:
      local: the directory of the local ones; None where only durable copies were named.
      durable: the place of the copies; None where there is none.
    """

    local: Path | None
    durable: Durable | None

    def entries(self) -> list[Entry]:
        """Every checkpoint, the newest step first and the local one before its copy.

        Raises:
          UserError: a place cannot be read.
        """
        found = [] if self.local is None else _local(self.local)
        if self.durable is not None:
            try:
                found += _durable(self.durable)
            except OSError as error:
                raise UserError(
                    f"cannot read the durable checkpoints in {self.durable.url}: {error.strerror or error}; make the place "
                    f"readable, or look at the local ones alone: --level local"
                ) from error
        return sorted(found, key=lambda entry: (-entry.step, entry.level != "local", entry.files.name))

    def only(self, level: str | None) -> "Catalog":
        """One level of it.

        Raises:
          UserError: it has no such level.
        """
        if level is None:
            return self
        part = Catalog(self.local if level == "local" else None, self.durable if level == "durable" else None)
        if part == Catalog(None, None):
            other = self.local if self.durable is None else self.durable.url
            raise UserError(f"there are no {level} checkpoints here, only those in {other}")
        return part

    def choose(self, step: int | None) -> tuple[Entry, Record]:
        """The newest committed checkpoint, or that of a step, with its record.

        Raises:
          UserError: there is none.
          CheckpointError: it is damaged.
        """
        entries = [entry for entry in self.entries() if entry.state in COUNTED]
        chosen = [entry for entry in entries if entry.step == step] if step is not None else entries
        whole = [entry for entry in chosen if entry.state == "committed"]
        if not chosen:
            have = ", ".join(dict.fromkeys(str(entry.step) for entry in entries)) or "none"
            asked = "committed checkpoint" if step is None else f"checkpoint of step {step}"
            raise UserError(f"there is no {asked} in {self.describe()}; committed steps: {have}")
        entry = (whole or chosen)[0]
        return entry, read_record(entry.files)

    def describe(self) -> str:
        """Both places in words."""
        return " and ".join(
            [*([] if self.local is None else [str(self.local)]), *([] if self.durable is None else [self.durable.url])]
        )


def open_catalog(place: str) -> Catalog:
    """Find the checkpoints of a run directory, a directory of checkpoints, or a durable place (path or URL).

    Raises:
      UserError: there is no such directory, or it is none of these.
    """
    if "://" in place:
        return Catalog(None, Durable(place))
    path = Path(place)
    if not path.is_dir():
        raise UserError(f"{place} is not a directory; give a run directory, a directory of checkpoints or a durable place")
    inner = path / "checkpoints"
    if inner.is_dir():
        return Catalog(inner, remembered(inner))
    if any(path.glob(f"*/{MANIFEST}")) or any(path.glob(f"*/{SET_ASIDE}")):
        return Catalog(None, Durable(path))
    if (path / "config.yaml").exists():
        raise UserError(f"the run in {place} has saved no checkpoint yet (checkpoint.every_steps in its config)")
    if not (committed_steps(path) or unfinished(path)):
        raise UserError(
            f"{place} holds no checkpoints: neither a folder `checkpoints` nor step folders such as 500; give a run directory, a "
            "directory of checkpoints or a durable place"
        )
    return Catalog(path, remembered(path))


def open_one(word: str) -> tuple[Entry, Record]:
    """One checkpoint: a step directory, or any place of `open_catalog`, with @STEP behind it or the newest one.

    Raises:
      UserError: there is none.
      CheckpointError: it is damaged.
    """
    path = Path(word)
    if path.name.isdigit() and (path / "state").is_dir():
        if (path / MANIFEST).exists():
            return Catalog(None, Durable(path.parent)).choose(int(path.name))
        return Catalog(path.parent, None).choose(int(path.name))
    place, mark, step = word.rpartition("@")
    if mark and not step.isdigit() and not path.exists():
        raise UserError(f"{word}: behind the @ stands the number of a step, such as {place}@500")
    if mark and step.isdigit() and not path.exists():
        return open_catalog(place).choose(int(step))
    return open_catalog(word).choose(None)


def _local(directory: Path) -> list[Entry]:
    halves = set(unfinished(directory))
    entries = []
    for path in sorted(directory.iterdir()):
        aside, left_over = _SET_ASIDE_NAME.fullmatch(path.name), _LEFT_OVER_NAME.fullmatch(path.name)
        if not path.is_dir() or not (path.name.isdigit() or aside or left_over):
            continue
        step = int(aside[1] if aside else left_over[1] if left_over else path.name)
        files = step_files(path, step)
        state, reason = "set aside" if aside else "unfinished", ""
        if not aside and not left_over and path not in halves:
            state, reason = _state(files)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        entries.append(Entry(step, "local", state, size, path.stat().st_mtime, files, reason))
    return entries


def _durable(durable: Durable) -> list[Entry]:
    entries = []
    for step, names in durable.listing().items():
        files = durable.files(step)
        state, reason, size = "set aside" if SET_ASIDE in names else "unfinished", "", 0
        if MANIFEST in names:
            state, reason = _state(files)
            try:
                size = sum(file.size for file in durable.manifest(step).values())
            except CheckpointError as error:
                state, reason = "damaged", str(error)
        entries.append(Entry(step, "durable", state, size, _commit_time(files), files, reason))
    return entries


def _state(files: StepFiles) -> tuple[str, str]:
    """Of a committed step, from its records alone; `mlt checkpoint verify` reads the arrays too."""
    try:
        read_record(files)
        files.read("state/manifest.ocdbt")
    except UserError as error:
        if isinstance(error, Unreadable):
            return "unreadable", str(error)
        return "damaged" if isinstance(error, CheckpointError) else "newer format", str(error)
    except OSError as error:
        return "damaged", f"cannot read state/manifest.ocdbt: {error.strerror}"
    return "committed", ""


def _commit_time(files: StepFiles) -> float | None:
    try:
        return json.loads(files.read("_CHECKPOINT_METADATA"))["commit_timestamp_nsecs"] / 1e9
    except (OSError, ValueError, KeyError, TypeError):
        return None
