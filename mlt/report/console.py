"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

_WIDTH_OF_BAR = 76  # columns of a terminal from which a bar is more than a few characters


class _Console(Console):
    """A console that ends no run: rich's own leaves with exit code 1 once nobody reads the pipe it writes to."""

    def on_broken_pipe(self) -> None:
        """Print no more, and leave nothing to be written when the process ends."""
        self.quiet = True
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        with contextlib.suppress(OSError):
            print("warning: nobody reads what this run prints any more; the run goes on", file=sys.stderr, flush=True)


class RunConsole:
    """Prints messages, the bar and one line per logged step.

    What cannot be printed (a full disk, a closed terminal, a pipe that nobody reads) is left out.
    """

    def __init__(self, total_steps: int, file: TextIO | None = None):
        self.console = _Console(highlight=False, soft_wrap=True, file=file)
        self.total = total_steps
        self.progress: Progress | None = None
        self.task = None

    def say(self, message: str) -> None:
        with contextlib.suppress(OSError):
            self.console.print(message, markup=False)

    def start(self, step: int) -> None:
        """Begin the bar at a step already done."""
        if not self.console.is_terminal:
            return
        # One column of text, the step first: a narrow terminal cuts the end of it, and the bar takes what is left over.
        text = TextColumn("step {task.completed}/{task.total}  {task.fields[line]}", table_column=Column(no_wrap=True))
        bar = (BarColumn(bar_width=None, table_column=Column(ratio=1)), TimeRemainingColumn())
        columns = (text, *bar) if self.console.width >= _WIDTH_OF_BAR else (text,)
        self.progress = Progress(*columns, console=self.console, transient=True, expand=True)
        with contextlib.suppress(OSError):
            self.progress.start()
        self.task = self.progress.add_task("train", total=self.total, completed=step, line="")

    def logged(self, step: int, metrics: Mapping[str, float], bits_per_byte: float | None) -> None:
        """Show a logged step."""
        speed, wait = metrics["throughput/tokens_per_second"], metrics["data/wait_seconds"]
        bits = "" if bits_per_byte is None else f"{bits_per_byte:.2f} bits/byte  "
        line = f"loss {metrics['train/loss']:.3f}  {bits}{speed:,.0f} tokens/s"
        if wait > 0.01:
            line += f"  waited {wait:.2f} s for data"
        line += "".join(f"  {name}" for name, value in metrics.items() if name.startswith("alarm/") and value)
        if self.progress is None:
            self.say(f"step {step}/{self.total}  {line}")
        else:
            self.progress.update(self.task, completed=step, line=line)

    def stop(self) -> None:
        if self.progress is not None:
            with contextlib.suppress(OSError):
                self.progress.stop()
            self.progress = None


def open_console(total_steps: int, *, process: int, log_path: Path) -> RunConsole:
    """The terminal for process 0; for any other process of a run a file, which then takes its warnings as well."""
    if process == 0:
        return RunConsole(total_steps)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    file = log_path.open("a", buffering=1)
    logger = logging.getLogger("mlt")
    logger.handlers[:] = [logging.StreamHandler(file)]
    logger.propagate = False
    return RunConsole(total_steps, file)
