"""`mlt verify`: the proofs for the model of any config."""

from collections.abc import Callable

from mlt.config.check import check_run
from mlt.config.run import RunConfig
from mlt.verify.causality import causality
from mlt.verify.decode import decode
from mlt.verify.gradients import gradients
from mlt.verify.isolation import alone, isolation
from mlt.verify.model import subject_of

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
