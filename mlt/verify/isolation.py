"""Packed documents do not see each other: not one bit of logits or gradients, and each computes what it does alone."""

import numpy as np

from mlt.verify.model import Subject
from mlt.verify.result import Result, largest_difference

ALONE_TOLERANCE = 1e-4


def isolation(subject: Subject, seed: int) -> Result:
    """Replace the tokens of one document after another; everything outside must keep every bit."""
    batch = subject.rows(seed)
    logits, gradient = np.asarray(subject.logits(batch)), np.asarray(subject.stream_gradient(batch))
    rng = np.random.default_rng(seed + 1)
    changed, documents, silent = 0, 0, 0
    for row, segment in _documents(batch):
        inside = np.zeros(batch["tokens"].shape, bool)
        inside[row] = batch["segment_ids"][row] == segment
        other = dict(batch)
        other["tokens"] = np.where(inside, rng.integers(0, subject.num_ids, inside.shape), batch["tokens"]).astype(np.int32)
        new_logits, new_gradient = np.asarray(subject.logits(other)), np.asarray(subject.stream_gradient(other))
        real = ~inside & (batch["segment_ids"] > 0)
        changed += _changed_bits(logits[real], new_logits[real]) + _changed_bits(gradient[real], new_gradient[real])
        moved = (other["tokens"] != batch["tokens"]).any()
        silent += int(moved and np.array_equal(logits[inside], new_logits[inside]))
        documents += 1
    facts = f"{documents} documents replaced in turn; {changed} values of other documents' logits and gradients changed"
    if silent:
        return Result("isolation", False, f"{silent} replaced documents did not change their own logits: the model ignores them")
    return Result("isolation", changed == 0, facts)


def alone(subject: Subject, seed: int) -> Result:
    """A packed document's logits equal those of the document alone at the start of an empty row."""
    batch = subject.rows(seed)
    logits = np.asarray(subject.logits(batch))
    worst = 0.0
    for row, segment in _documents(batch):
        where = np.flatnonzero(batch["segment_ids"][row] == segment)
        single = {name: np.zeros_like(value) for name, value in batch.items()}
        for name in batch:
            single[name][0, : len(where)] = batch[name][row, where]
        single["segment_ids"][0, : len(where)] = 1
        lonely = np.asarray(subject.logits(single))[0, : len(where)]
        worst = max(worst, largest_difference(logits[row, where], lonely))
    bound, words = subject.bound(batch, worst, ALONE_TOLERANCE)
    return Result("alone", worst <= bound, f"packed against alone: relative difference {worst:.1e} ({words})")


def _documents(batch):
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in np.unique(segments[segments > 0]):
            yield row, segment


def _changed_bits(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.sum(a.view(np.uint32) != b.view(np.uint32)))
