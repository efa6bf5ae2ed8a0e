"""What every part of the training loop uses: where the run lives, who watches it, where its time and news go."""

import dataclasses

from mlt.config.run import RunConfig
from mlt.report.console import RunConsole
from mlt.report.sinks import tolerant_rows
from mlt.train.goodput import Goodput
from mlt.train.logbook import Logbook
from mlt.train.peers import Alone
from mlt.train.run_directory import RunDirectory
from mlt.train.setup import Setup
from mlt.train.signals import StopRequest
from mlt.train.skips import SkipWatch
from mlt.train.stopping import Stopping
from mlt.train.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Services:
    """One of each for a process of a run.

    Attributes:
        setup: what is fixed for the whole run.
        directory: where it lives.
        console: takes lines for whoever watches.
        peers: the other processes.
        stopping: whether the run is to stop.
        watchdog: is told of every phase.
        goodput: accounts for every second.
        book: rows of the metrics, and alarms.
        skips: the record of skipped steps.
    """

    setup: Setup
    directory: RunDirectory
    console: RunConsole
    peers: Alone
    stopping: Stopping
    watchdog: Watchdog
    goodput: Goodput
    book: Logbook
    skips: SkipWatch

    @property
    def config(self) -> RunConfig:
        return self.setup.config


def open_services(setup: Setup, directory: RunDirectory, console: RunConsole, stop: StopRequest, peers: Alone) -> Services:
    """Make them. Only process 0 writes rows: the others have the same numbers."""
    train = setup.config.train
    rows = tolerant_rows if peers.index == 0 else lambda path: lambda row: None
    goodput_path, skipped_path = directory.logs_path / "goodput.jsonl", directory.logs_path / "skipped.jsonl"
    goodput = Goodput(goodput_path, write=rows(goodput_path))
    skips = SkipWatch(
        train.guard,
        write=rows(skipped_path),
        say=console.say,
        advice=f"The checkpoints in {directory.checkpoints_path} are from before; {skipped_path} says what was skipped. "
        "Lower optimizer.learning_rate or train.clip_norm, or look at those documents, and start a new run",
    )
    return Services(
        setup=setup,
        directory=directory,
        console=console,
        peers=peers,
        stopping=Stopping(stop, peers),
        watchdog=Watchdog(train.hang_timeout_seconds, directory.stacks_path(peers.index), tell=peers.leave),
        goodput=goodput,
        book=Logbook(setup, console, goodput),
        skips=skips,
    )
