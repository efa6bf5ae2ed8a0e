"""No output depends on a later token, to the bit."""

import numpy as np

from mlt.verify.model import Subject
from mlt.verify.result import Result


def causality(subject: Subject, seed: int) -> Result:
    """Replace all tokens from a cut on, at several cuts; every earlier logit must keep every bit."""
    batch = subject.rows(seed)
    logits = np.asarray(subject.logits(batch))
    rng = np.random.default_rng(seed + 2)
    cuts = sorted({1, 2, *(int(c) for c in rng.integers(1, subject.length, 6)), subject.length - 1})
    changed = 0
    real = batch["segment_ids"] > 0
    for cut in cuts:
        other = dict(batch)
        other["tokens"] = batch["tokens"].copy()
        other["tokens"][:, cut:] = rng.integers(0, subject.num_ids, other["tokens"][:, cut:].shape)
        new = np.asarray(subject.logits(other))
        before = real[:, :cut]
        changed += int(np.sum(logits[:, :cut][before].view(np.uint32) != new[:, :cut][before].view(np.uint32)))
    facts = f"tokens replaced from {len(cuts)} cuts on; {changed} earlier logits changed"
    return Result("causality", changed == 0, facts)
