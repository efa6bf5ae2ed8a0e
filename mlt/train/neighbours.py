"""Between the neighbours of a run's documents and its loss: what must agree, what a batch brings."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from mlt.config.problems import Problem
from mlt.config.run import RunConfig
from mlt.data.neighbours import IDS, PROBABILITIES, read_header
from mlt.errors import UserError


def neighbour_problems(config: RunConfig) -> Iterator[Problem]:
    """Neighbours without a share in the loss, a share without neighbours, and neighbours of another tokenizer."""
    neighbours, weight = config.data.neighbours, config.train.neighbour_weight
    if neighbours is None:
        if weight is not None:
            ways_out = "make targets with tools/datastore.py, or leave the weight None"
            yield Problem("data.neighbours", None, f"and train.neighbour_weight is {weight}: there is nothing to learn", ways_out)
        return
    if weight is None:
        rule = "and data.neighbours is set: nothing would read it"
        yield Problem("train.neighbour_weight", None, rule, "0.5 is Memory Decoder's, 0.4 MLP Memory's")
    if config.train.distill is not None and config.train.distill.listens:
        rule = "learns from the teacher, and data.neighbours is set: a loss has one of them beside the data"
        yield Problem("train.distill.weight", config.train.distill.weight, rule, "match='logits' with weight=0, or no neighbours")
    try:
        made_with = read_header(neighbours.folder)["tokenizer"]
    except UserError:
        return  # told of by the files' own check
    if made_with != config.data.tokenizer.digest:
        rule = "was made with another tokenizer: its ids mean other tokens"
        yield Problem("data.neighbours.folder", neighbours.folder, rule, "make it with this one")


def neighbour_fields(config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What the loader adds to a training batch, as one token has it."""
    if config.data.neighbours is None:
        return {}
    width = config.data.neighbours.width
    return {IDS: jax.ShapeDtypeStruct((width,), jnp.int32), PROBABILITIES: jax.ShapeDtypeStruct((width,), jnp.float32)}
