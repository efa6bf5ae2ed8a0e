"""Prints a hash of every global batch, and of the initial parameters, put together from what each process holds."""

import hashlib
import os
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from mlt.config.load import load_config
from mlt.config.run import RunConfig
from mlt.data.loader import load_corpus, open_loader
from mlt.train.distributed import joined
from mlt.train.feed import Feed
from mlt.train.processes import find_processes
from mlt.train.setup import build_optimizer, describe_model
from mlt.train.state import create_state

TINY = pathlib.Path(__file__).parent / "tiny.py"


def whole(array: jax.Array) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


config = load_config(TINY, sets=("mesh.fsdp=2",), root=RunConfig)
with joined(find_processes(os.environ), config):
    rules = config.mesh.rules()
    feed = Feed(rules, config.data.batch_size, config.data.sequence_length)
    loader = open_loader(config.data, load_corpus(config.data), places=feed.places)
    for _ in range(5):
        batch = {name: whole(array) for name, array in feed(next(loader)).items()}
        print("batch", hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest())
    loader.close()
    specs = describe_model(config)
    state = create_state(specs, build_optimizer(config, specs), rules, seed=3)
    leaves = [whole(leaf).tobytes() for leaf in jax.tree.leaves(state.model)]
    print("state", hashlib.sha256(b"".join(leaves)).hexdigest())
    print("rows", len(feed.places))
