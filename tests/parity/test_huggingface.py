"""Logits of code we did not write: transformers' models with their weights in ours, and back.

Goldens come from tools/parity_goldens.py. Documents are 13 and 18 tokens; each is compared alone and with the other packed
in front or behind it, which in transformers needs CUDA kernels for anything recurrent, so that both are held to its logits
of the document alone.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tool_files import tool

from mlt.export.huggingface.links import write_all
from mlt.export.huggingface.registry import architecture_of, read_config, write_config
from mlt.export.huggingface.weights import model_of, read_model, write_model
from mlt.export.names import to_tensors
from mlt.mixers.base import Context
from mlt.model.remat import Remat
from mlt.parallel.rules import Rules

TOLERANCE = 1e-4


parity = tool("parity_goldens")


@functools.cache
def golden(name):
    with np.load(parity.golden_path(name)) as file:
        stored = {key: file[key] for key in file.files}
    values = json.loads(str(stored["config"]))
    shapes = {key: tuple(shape) for key, shape in json.loads(str(stored["shapes"])).items()}
    theirs = parity.weights(shapes, int(stored["seed"]))
    config = read_config(values, name)
    return stored, values, theirs, config, model_of(config, values, theirs, config.build(), name)


def our_logits(model, ids, lengths):
    """Logits (T, V) of each document alone, the first first packed, and packed in the other order: one program for all."""
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    total = len(ids)
    rows = [[parts[0]], [parts[1]], parts, parts[::-1]]
    tokens, segments, positions = (np.zeros((len(rows), total), np.int32) for _ in range(3))
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, start=1):
            where = slice(start, start + len(document))
            tokens[row, where], segments[row, where] = document, number
            positions[row, where] = np.arange(len(document))
            start = where.stop
    context = Context(tokens, segments, positions, Rules(None), False)
    run = jax.jit(lambda model, context: model.logits(model(context, dtype=jnp.dtype("float32"), remat=Remat(mode="none"))[0]))
    # These programs run once: what the compiler's back end saves by optimizing it has spent.
    program = run.lower(model, context).compile()
    out = np.asarray(program(model, context))
    first, second = lengths
    return {
        "alone": np.concatenate([out[0, :first], out[1, :second]]),
        "packed": out[2],
        "packed the other way": np.concatenate([out[3, second:], out[3, :second]]),
    }


def assert_close(found, wanted, rounding, how):
    """Logits within the tolerance, and what one rounding of every weight moves them by where a golden says so."""
    over = np.abs(found - wanted).max(-1) - rounding
    assert over.max() <= TOLERANCE, f"{how}: token {over.argmax()} is {over.max():.1e} further off than rounding explains"


def rounding_of(stored):
    """What float32 may add at each token: what rounding the weights moves it by, as often as transformers' own float32,
    which rounds more than weights, exceeds that where it is largest. Compilers round in different places."""
    rounding = stored.get("rounding", np.zeros(1))
    return rounding * max(1.0, stored.get("float32_error", 0.0) / max(rounding.max(), 1e-30))


@pytest.mark.parametrize("name", parity.CASES)
def test_logits(name):
    stored, _, _, _, model = golden(name)
    wanted = stored["logits"]
    assert 1.0 < np.abs(wanted).max() < 30.0
    for how, found in our_logits(model, stored["ids"], stored["lengths"]).items():
        assert_close(found, wanted, rounding_of(stored), how)


@pytest.mark.parametrize("name", parity.CASES)
def test_export_gives_the_same_file(name):
    """Config and tensors go back as they came: equal fields to the point of equal models, weights to the bit."""
    _, values, theirs, config, model = golden(name)
    architecture, fields = write_config(config)
    assert architecture is architecture_of(values, name)
    assert read_config({"model_type": values["model_type"], **fields}, name) == config
    tensors = write_all(architecture.links(config), to_tensors(config, model))
    theirs = architecture.respelled(theirs)
    assert tensors.keys() == theirs.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(tensors[key], array, err_msg=key, strict=True)


@pytest.mark.parametrize("name", parity.CASES)
def test_live(name, tmp_path):
    """Where torch and transformers are at hand: what we export loads there, every tensor used, and computes the same."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    _, _, _, config, model = golden(name)
    architecture, fields = write_config(config)
    write_model(config, model, architecture, {**fields, "max_position_embeddings": 64, "pad_token_id": 0}, tmp_path)
    again, read_back = read_model(tmp_path)
    assert again == config
    parts = parity.documents(config.vocab_size, seed=2)
    wanted, rounding = parity.reference(parity.load(tmp_path), parts, name)
    found = our_logits(read_back, np.concatenate(parts), [len(part) for part in parts])["alone"]
    assert_close(found, wanted, rounding, "live")
