"""What befalls a run in the fault suite: each kind starts the command, breaks something, and leaves the rest to a restart."""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

from fork_server import Child

from mlt.checkpoint.layout import committed_steps, step_path, unfinished
from mlt.run_paths import RunPaths
from mlt.verify.resume_compare import rows

LOOK_SECONDS = 0.001
_BLOCK = 1 << 16


class Ended(Exception):
    """The run ended before its moment came."""


def until(child: Child, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not holds():
        if child.ended():
            raise Ended
        if time.monotonic() > end:
            raise AssertionError(f"the moment did not come:\n{child.output()[-2000:]}")
        time.sleep(LOOK_SECONDS)


def last_step(paths: RunPaths) -> int:
    """The last step whose loss is on the disk."""
    return max((row["step"] for row in rows(paths.path) if "train/loss" in row), default=0)


def moment(child: Child, paths: RunPaths, rng: random.Random, steps: int, *, early: bool = True) -> str:
    """Wait for a random moment of a run; what it was. `early` ones may come before the first step."""
    first = last_step(paths)
    name = rng.choice((["start"] if early else []) + ["step", "save", "commit", "evaluation"])
    if name == "start":
        delay = rng.uniform(0.0, 2.0)
        end = time.monotonic() + delay
        until(child, lambda: time.monotonic() >= end)
        return f"{delay:.2f} s after its start"
    if name == "step":
        step = rng.randrange(min(first + 1, steps - 1), steps)
        until(child, lambda: last_step(paths) >= step)
        time.sleep(rng.uniform(0.0, 0.02))
        return f"step {step}"
    if name == "evaluation":
        done = {row["step"] for row in rows(paths.path) if "eval/loss" in row}

        def evaluating() -> bool:
            found = rows(paths.path) if "compiled in" in child.output() else []
            return bool(found) and "train/loss" in found[-1] and found[-1]["step"] % 10 == 0 and found[-1]["step"] not in done

        until(child, evaluating)
        return f"the evaluation after step {last_step(paths)}"
    there = committed_steps(paths.checkpoints_path)
    newest = there[-1] if there else 0
    skip = rng.randrange(0, 3)

    def committed() -> int:
        return sum(step > newest for step in committed_steps(paths.checkpoints_path))

    if name == "commit":
        until(child, lambda: committed() > skip)
        return "a commit"
    until(child, lambda: committed() >= skip and bool(unfinished(paths.checkpoints_path)))
    time.sleep(rng.uniform(0.0, 0.03))
    return "a save"


def damage(path: pathlib.Path, rng: random.Random, how: str) -> str:
    """Truncate a file, flip some of its bits, or delete it; in words."""
    size = path.stat().st_size
    if how == "delete" or size == 0:
        path.unlink()
        return f"deleted {path.name}"
    if how == "truncate":
        left = rng.randrange(size)
        os.truncate(path, left)
        return f"cut {path.name} from {size} to {left} bytes"
    content = bytearray(path.read_bytes())
    places = [rng.randrange(size) for _ in range(rng.randint(1, 8))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"flipped {len(places)} bits of {path.name}"


def damage_newest(paths: RunPaths, rng: random.Random, how: str) -> tuple[int, str] | None:
    """Damage a random file of the newest committed step: (the step, in words)."""
    there = committed_steps(paths.checkpoints_path)
    if not there:
        return None
    files = sorted(path for path in step_path(paths.checkpoints_path, there[-1]).rglob("*") if path.is_file())
    return there[-1], f"step {there[-1]}: {damage(rng.choice(files), rng, how)}"


def cut_mid_line(path: pathlib.Path, rng: random.Random) -> str | None:
    """Cut a text file off in the middle of a line."""
    if not path.exists():
        return None
    content = path.read_bytes()
    places = [place for place in range(1, len(content)) if content[place - 1] != 10]
    if not places:
        return None
    place = rng.choice(places)
    os.truncate(path, place)
    return f"cut {path.name} from {len(content)} to {place} bytes"


@contextlib.contextmanager
def small_disk(place: pathlib.Path, size: str = "24m") -> Iterator[None]:
    """A file system of its own at `place`, for as long as the block lasts."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True, capture_output=True)
    try:
        yield
    finally:
        _unmount(place)


def can_mount(place: pathlib.Path) -> bool:
    """Whether this user may mount file systems here."""
    try:
        with small_disk(place / "probe", "64k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def fill(place: pathlib.Path, leave: int) -> pathlib.Path:
    """A file that takes all room of a disk but `leave` bytes."""
    filler = place / "filler"
    stat = os.statvfs(place)
    left = stat.f_bavail * stat.f_frsize - leave
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(b"x" * min(left, _BLOCK))
    return filler


@contextlib.contextmanager
def read_only(place: pathlib.Path) -> Iterator[None]:
    """Everything below `place` cannot be written through its path, for as long as the block lasts."""
    subprocess.run(["mount", "--bind", place, place], check=True, capture_output=True)
    try:
        # Refused while the run has a file open that it opened through the new mount.
        while subprocess.run(["mount", "-o", "remount,bind,ro", place], capture_output=True, check=False).returncode:
            time.sleep(LOOK_SECONDS)
        yield
    finally:
        _unmount(place)


def _unmount(place: pathlib.Path) -> None:
    if subprocess.run(["umount", place], capture_output=True, check=False).returncode:
        subprocess.run(["umount", "--lazy", place], check=True, capture_output=True)


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
