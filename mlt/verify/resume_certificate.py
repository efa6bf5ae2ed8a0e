"""The certificate of `mlt verify CONFIG --resume`: what was done, what was found, as JSON and as text."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlt.run_paths import write_whole

_PACKAGES = ("mlt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_WIDTH = 130


@dataclasses.dataclass
class Kill:
    """One interruption.

    Attributes:
        where: the moment, see `mlt.verify.resume_points`.
        signal: its name.
        hit: the run was stopped at that moment.
        misses: how often the run was past it before it could be stopped.
        step: the last step that was logged.
        committed: the newest checkpoint that lay whole on the disk afterwards.
        exit_code: of the stopped process; negative, the signal that ended it.
        resumed_from: the step after which the same command went on; 0 from the beginning.
    """

    where: str
    signal: str
    hit: bool = False
    misses: int = 0
    step: int = 0
    committed: int = 0
    exit_code: int | None = None
    resumed_from: int | None = None

    def text(self) -> str:
        missed = f", missed {self.misses} times" if self.misses else ""
        if not self.hit:
            return f"{self.signal} {self.where}: never hit{missed}"
        resumed = "" if self.resumed_from is None else f", resumed after step {self.resumed_from}"
        return f"{self.signal} {self.where}: step {self.step} was logged, {self.committed} committed{resumed}{missed}"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that was compared: whether it holds, and the facts."""

    what: str
    holds: bool
    facts: str


@dataclasses.dataclass
class Certificate:
    """Attributes:
    config: name of the config.
    config_hash: of the config as it was trained here: over few steps, saved often.
    steps: of each run.
    kills: in the order in which they were made.
    findings: everything that was compared.
    notes: what was left out, and why.
    """

    config: str
    config_hash: str
    steps: int
    kills: list[Kill] = dataclasses.field(default_factory=list)
    findings: list[Finding] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    made: str = dataclasses.field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    @property
    def holds(self) -> bool:
        """Every kill was made where it was meant to be, and everything compared is as it must be."""
        return bool(self.findings) and all(f.holds for f in self.findings) and all(kill.hit for kill in self.kills)

    def find(self, what: str, holds: bool, facts: str) -> None:
        """Note something that was compared."""
        self.findings.append(Finding(what, holds, facts))

    def to_json(self) -> dict[str, Any]:
        return {
            "certificate": "resume",
            "holds": self.holds,
            **dataclasses.asdict(self),
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "python": platform.python_version(),
            "system": platform.platform(),
        }

    def text(self) -> str:
        """Tables of kills and findings."""
        console = Console(width=_WIDTH, color_system=None, force_terminal=False)
        with console.capture() as capture:
            for part in (self._kills(), self._findings()):
                console.print(part)
            for note in self.notes:
                console.print(f"left out: {note}", markup=False)
            counted = f"{sum(kill.hit for kill in self.kills)} of {len(self.kills)} kills, {len(self.findings)} comparisons"
            console.print(
                f"resume {'HOLDS' if self.holds else 'FAILS'}: {self.config}, {self.steps} steps, {counted}", markup=False
            )
        return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"

    def write(self, out: Path) -> None:
        """Write certificate.json and certificate.txt, each whole or not at all."""
        write_whole(out / "certificate.json", json.dumps(self.to_json(), indent=2) + "\n")
        write_whole(out / "certificate.txt", f"made {self.made}, config {self.config_hash}\n{self.text()}")

    def _kills(self) -> Table:
        table = Table(title="stopped")
        for name in ("where", "signal", "last step logged", "committed", "exit code", "resumed after", "missed before"):
            table.add_column(name, justify="left" if name in ("where", "signal") else "right")
        for kill in self.kills:
            cells = (kill.step, kill.committed, kill.exit_code, kill.resumed_from) if kill.hit else ("never hit", "", "", "")
            table.add_row(kill.where, kill.signal, *("" if cell is None else str(cell) for cell in cells), str(kill.misses))
        return table

    def _findings(self) -> Table:
        table = Table(title="compared with the uninterrupted run")
        table.add_column("what")
        table.add_column("")
        table.add_column("facts", overflow="fold")
        for found in self.findings:
            table.add_row(found.what, "holds" if found.holds else "FAILS", found.facts)
        return table
