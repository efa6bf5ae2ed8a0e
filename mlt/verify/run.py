"""`mlt verify`: the proofs for the model of any config."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from mlt.config.check import check_run
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.parallel.mesh import AXES, Layout
from mlt.plan.collectives import summary
from mlt.verify.causality import causality
from mlt.verify.decode import decode
from mlt.verify.gradients import gradients
from mlt.verify.isolation import alone, isolation
from mlt.verify.mesh import mesh
from mlt.verify.model import subject_of
from mlt.verify.resume import Options, verify_resume

PROOFS = (isolation, alone, causality, decode, gradients)


def verify(config: RunConfig, *, seed: int, say: Callable[[str], None]) -> bool:
    """Run every proof on the config's model with random weights in float32; True if all hold."""
    check_run(config)
    subject = subject_of(config, seed)
    say(f"{config.model.stack.num_layers} layers, rows of {subject.length} tokens in packed documents, random weights, float32")
    passed = True
    for proof in PROOFS:
        result = proof(subject, seed)
        passed &= result.passed
        say(f"{result.name:<10} {'holds' if result.passed else 'FAILS'}   {result.facts}")
    return passed


def verify_mesh(config: RunConfig, layout: Layout, *, seed: int, say: Callable[[str], None]) -> bool:
    """Compare a layout with one device, and say what its train step sends; True if they agree.

    Without enough accelerators the devices are simulated on the CPU, each with its own memory and program.
    """
    simulate(layout.num_devices)
    # The batch is made to fit the layout: what the run's own batch allows is not the question here.
    rows = config.data.batch_size * layout.batch_shards * config.train.grad_accumulation
    config = config.replace(mesh=layout, data=config.data.replace(batch_size=rows))
    check_run(config)
    result, sent = mesh(config, layout, seed)
    degrees = ", ".join(f"{axis}={size}" for axis, size in layout.shape().items() if size > 1) or "one device"
    say(f"{degrees} against one device: loss, gradients and one update in float32, documents across shards")
    say(f"{result.name:<10} {'holds' if result.passed else 'FAILS'}   {result.facts}")
    say(f"one train step sends, on each device:\n{summary(sent)}")
    return result.passed


def certify(config: RunConfig, options: Options, source: Path, out: Path | None, *, say: Callable[[str], None]) -> bool:
    """Make the resume certificate of a config and say it; True if it holds.

    It is written to `out`; None takes the run directory that `source` is, or a directory with the name of the config file.
    """
    if out is None:
        out = source if source.is_dir() else Path(f"{source.stem}-certificate")
    certificate = verify_resume(config, options, out, say=say)
    say(certificate.text())
    say(f"{out / 'certificate.json'}")
    return certificate.holds


def simulate(count: int) -> None:
    """At least `count` devices: those there are, or simulated ones on the CPU.

    Raises:
        UserError: there are accelerators, but fewer.
    """
    # Refused once devices exist; the count says whether they are enough.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(count, 1))
    if jax.device_count() < count:
        raise UserError(
            f"--mesh needs {count} devices, and {jax.device_count()} {jax.devices()[0].platform} device(s) are here; "
            f"to simulate them on the CPU, run with JAX_PLATFORMS=cpu"
        )


def parse_layout(text: str, layout: Layout) -> Layout:
    """`context=4,fsdp=2` as a layout; axes that are not named are 1, strategies are those of `layout`.

    Raises:
        UserError: an axis or a degree is wrong.
    """
    degrees = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, value = part.strip().partition("=")
        if axis not in AXES:
            raise UserError(f"--mesh {text}: no axis {axis!r}; the axes are {', '.join(AXES)}, as in context=4,fsdp=2")
        if not value.isdigit() or int(value) < 1:
            raise UserError(f"--mesh {text}: {axis} must be a number of shards from 1 on, got {value!r}")
        degrees[axis] = int(value)
    return layout.replace(**degrees)
