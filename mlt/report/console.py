"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunConsole:
    """Prints messages, the bar and one line per logged step. What cannot be printed (a full disk) is left out."""

    def __init__(self, total_steps: int, file: TextIO | None = None):
        self.console = Console(highlight=False, soft_wrap=True, file=file)
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
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, transient=True)
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
