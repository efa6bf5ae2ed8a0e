"""The part of a resume certificate that is made elsewhere: the uninterrupted run goes on from a checkpoint on other devices."""

import dataclasses
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from mlt.checkpoint.layout import committed_steps, step_path
from mlt.config.check import check_run
from mlt.config.problems import ConfigError
from mlt.config.run import RunConfig
from mlt.parallel.mesh import AXES, Layout
from mlt.run_paths import RunPaths
from mlt.verify.resume_certificate import Certificate
from mlt.verify.resume_child import batches_seen
from mlt.verify.resume_compare import numbers, relative_difference, shown, unequal
from mlt.verify.resume_runs import Runs

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest relative difference of the losses on another layout, by compute type: sums are made in another order there."""


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Attributes:
    runs: starts them.
    whole: the uninterrupted run.
    steps: of each run.
    certificate: takes what is found.
    say: takes lines for whoever watches.
    """

    runs: Runs
    whole: Path
    steps: int
    certificate: Certificate
    say: Callable[[str], None]

    def prove(self, layout: Layout | None, count: int) -> None:
        """Go on with another mesh and with another number of processes.

        Args:
            layout: the mesh; None takes the first that fits.
            count: the number of processes; 1 leaves this part out.
        """
        middle = max(step for step in committed_steps(RunPaths(self.whole).checkpoints_path) if step <= self.steps // 2)
        layout = layout or next(_fitting(self.runs.config, 1), None)
        if layout is None:
            self.certificate.notes.append("no other mesh of two devices fits this config; name one with --mesh")
        else:
            self._goes_on("another mesh", layout, 1, middle)
        if count == 1:
            self.certificate.notes.append("no other number of processes was asked for")
            return
        several = layout
        if several is None or several.num_devices % count:
            several = next(_fitting(self.runs.config, count), None)
        if several is None:
            self.certificate.notes.append(f"no mesh of {count} devices fits this config, so {count} processes were not tried")
        else:
            self._goes_on(f"{count} processes", several, count, middle)

    def _goes_on(self, what: str, layout: Layout, count: int, middle: int) -> None:
        """Resume after step `middle` in `count` processes over a layout, and compare batches and losses."""
        degrees = ", ".join(f"{axis}={size}" for axis, size in layout.shape().items() if size > 1) or "one device"
        kind = self.runs.config.train.compute_dtype
        tolerance = TOLERANCES[kind]
        name = f"{what} ({degrees})"
        self.say(f"{name}: resuming after step {middle}")
        run = self.runs.place / what.replace(" ", "-")
        shutil.copytree(
            step_path(RunPaths(self.whole).checkpoints_path, middle), step_path(RunPaths(run).checkpoints_path, middle)
        )
        shutil.copyfile(RunPaths(self.whole).config_path, RunPaths(run).config_path)
        sets = [f"--set=mesh.{axis}={size}" for axis, size in layout.shape().items()]
        variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(layout.num_devices // count)}
        address = {"MLT_COORDINATOR": f"127.0.0.1:{_free_port()}", "MLT_NUM_PROCESSES": str(count)} if count > 1 else {}
        children = [
            self.runs.start(run, *sets, **variables, **address, **({"MLT_PROCESS_ID": str(index)} if count > 1 else {}))
            for index in range(count)
        ]
        codes = [child.end() for child in children]
        if any(codes) or children[0].resumed_from() != middle:
            self.certificate.find(name, False, f"ended with {codes}: {children[0].output()[-2000:]}")
            return
        try:
            whole_seen, seen = batches_seen(self.runs.notes(self.whole)), batches_seen(self.runs.notes(run))
        except ValueError as error:
            self.certificate.find(f"{name}: batches", False, str(error))
            return
        start = min(tokens for tokens, _ in seen)
        expected = {key: digest for key, digest in whole_seen.items() if key[0] >= start}
        lines = unequal(expected, seen)
        steps = len({tokens for tokens, _ in expected})
        if steps != self.steps - middle:
            lines.append(f"{steps} batches for {self.steps - middle} steps")
        same = f"{len(expected)} rows of {steps} batches, all bits equal"
        self.certificate.find(f"{name}: batches", not lines, f"differ: {shown(lines)}" if lines else same)
        worst, compared = relative_difference(numbers(self.whole), numbers(run), "train/loss")
        holds = worst <= tolerance and compared == self.steps - middle
        facts = f"relative difference {worst:.1e} over {compared} steps (at most {tolerance:g} in {kind})"
        self.certificate.find(f"{name}: losses", holds, facts)


def _fitting(config: RunConfig, processes: int) -> Iterator[Layout]:
    """Layouts that the config's own rules accept, other than its own; the simplest first."""
    own = config.mesh
    none = dict.fromkeys(AXES, 1)
    if processes == 1 and own.num_devices > 1:
        yield own.replace(**none)
        return
    size = max(processes, 2)
    for axis in ("fsdp", "replica", "tensor", "context", "expert"):
        layout = own.replace(**(none | {axis: size}))
        try:
            check_run(config.replace(mesh=layout))
        except ConfigError:
            continue
        yield layout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
