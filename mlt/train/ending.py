"""What a run says about itself when it starts and when it is done."""

import importlib.metadata
import platform
from typing import Any

import jax

from mlt.config.dump import config_hash
from mlt.errors import UserError
from mlt.report.console import RunConsole
from mlt.report.page import write_report
from mlt.train.run_directory import RunDirectory
from mlt.train.setup import Setup


def start_facts(setup: Setup, first: int, num_processes: int) -> dict[str, Any]:
    """What the report says about where and from what a run started."""
    return {
        "first_step": first,
        "steps": setup.config.train.steps,
        "config_hash": config_hash(setup.config),
        "corpus": setup.corpus.hash,
        "corpus_bytes": setup.corpus.bytes_read,
        **{name: importlib.metadata.version(name) for name in ("mlt", "jax", "flax", "optax", "orbax-checkpoint")},
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_processes": num_processes,
    }


def say_what_next(directory: RunDirectory, console: RunConsole) -> None:
    """Write the report, and name the commands that go on from here. A report that cannot be written is a warning."""
    try:
        write_report(directory.path)
    except (UserError, OSError) as error:
        console.say(f"warning: no report: {error}; `mlt report {directory.path}` tries again")
    run = directory.path
    console.say(
        f"checkpoints: {directory.checkpoints_path}\nreport: {directory.report_path}\nnext:\n"
        f'  mlt generate {run} --prompt "import "    more text\n'
        f"  mlt verify {run}    isolation, causality, decoding and gradients of this model\n"
        f"  mlt export {run} --to {run}/export    weights, config and tokenizer\n"
    )
