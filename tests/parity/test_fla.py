"""Layers of flash-linear-attention against our mixers with their weights; see tools/parity_fla.py for how the goldens are made.

Each document is compared alone and packed with the other, which fla does to the same outputs.

MomAttention convolves over the tokens of a memory, or, in training, over whatever token the sort put in front: a wrong neighbour,
as the sheet's erratum says. Ours convolves over neighbours in the document. So its golden has convolutions of one tap, where both
agree; wider ones are held to the float64 recurrence of tests/mixers/test_equations.py.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tool_files import tool

from mlt.export.huggingface.links import Link, Part, depthwise_conv, linear, read_all, vector
from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.sequence.delta_net import DeltaNet
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.mixers.sequence.gated_linear_attention import GatedLinearAttention
from mlt.mixers.sequence.kimi_delta import KimiDelta
from mlt.mixers.sequence.mixture_of_memories import MixtureOfMemories
from mlt.nn.param import named_leaves, path_name
from mlt.parallel.rules import Rules

TOLERANCE = 1e-4
WIDTH = 32


parity = tool("parity_goldens")


def projections(c, key_heads, **more):
    """Links of the projections that all of them name alike; `more` has the rows of others, by our name and theirs."""
    keys, values = key_heads * c.key_dim, c.num_heads * c.values
    rows = {"query q": keys, "key k": keys, "value v": values, **more}
    yield from (linear(f"{pair.split()[0]}.kernel", f"{pair.split()[1]}_proj.weight", n, WIDTH) for pair, n in rows.items())
    yield linear("output.kernel", "o_proj.weight", WIDTH, values)


def convolutions(c, key_heads):
    for name, channels in (("query", key_heads * c.key_dim), ("key", key_heads * c.key_dim), ("value", c.num_heads * c.values)):
        yield depthwise_conv(f"{name[0]}_conv1d.weight", c.conv_width, ((f"{name}_conv.kernel", channels),))


def low_rank(ours, theirs, rank, outputs):
    yield linear(f"{ours}_in.kernel", f"{theirs}.0.weight", rank, WIDTH)
    yield linear(f"{ours}_out.kernel", f"{theirs}.1.weight", outputs, rank)


def gla_links(c):
    keys = c.num_heads * c.key_dim
    yield from projections(c, c.num_heads, **{"gate g": c.num_heads * c.values})
    yield from low_rank("decay", "gk_proj", c.gate_rank, keys)
    yield vector("decay_out.bias", "gk_proj.1.bias", keys)
    yield vector("norm.scale", "g_norm_swish_gate.weight", c.values)


def delta_net_links(c):
    yield from projections(c, c.num_heads, **{"beta b": c.num_heads})
    yield from convolutions(c, c.num_heads)
    yield vector("norm.scale", "o_norm.weight", c.values)


def gated_delta_links(c):
    rows = {"gate g": c.num_heads * c.values, "beta b": c.num_heads, "decay a": c.num_heads}
    yield from projections(c, c.key_heads, **rows)
    yield from convolutions(c, c.key_heads)
    yield vector("A_log", "A_log", c.num_heads)
    yield vector("dt_bias", "dt_bias", c.num_heads)
    yield vector("norm.scale", "o_norm.weight", c.values)


def kda_links(c):
    keys, values = c.num_heads * c.key_dim, c.num_heads * c.values
    yield from projections(c, c.num_heads, **{"beta b": c.num_heads})
    yield from convolutions(c, c.num_heads)
    yield from low_rank("decay", "f_proj", c.values, keys)
    yield from low_rank("gate", "g_proj", c.values, values)
    yield vector("gate_out.bias", "g_proj.1.bias", values)
    yield vector("A_log", "A_log", c.num_heads)
    yield vector("dt_bias", "dt_bias", keys)
    yield vector("norm.scale", "o_norm.weight", c.values)


def mom_links(c):
    """Projections of each memory are tensors of their own there, the shared memory's last."""
    heads, keys, values = c.num_heads, c.num_heads * c.key_dim, c.num_heads * c.values
    for mine, other, size in (("key", "k", c.key_dim), ("value", "v", c.values), ("beta", "b", 1), ("decay", "a", 1)):
        names = (*(f"{other}_proj.{m}.weight" for m in range(c.num_memories)), f"shared_{other}.weight")
        part = Part(f"{mine}.kernel", c.memories, (3, 1, 0, 2), (c.memories, heads, size, WIDTH))
        yield Link(names, (heads * size, WIDTH), (part,))
    for mine, other, rows in (("router", "gate", c.num_memories), ("query", "q_proj", keys), ("gate", "g_proj", values)):
        yield linear(f"{mine}.kernel", f"{other}.weight", rows, WIDTH)
    yield linear("output.kernel", "o_proj.weight", WIDTH, values)
    yield depthwise_conv("q_conv1d.weight", c.conv_width, (("query_conv.kernel", keys),))
    for name, size in (("key", c.key_dim), ("value", c.values)):
        # One convolution for all memories there, one for each here.
        theirs = tuple(f"{name[0]}_conv1d.weight.{m}" for m in range(c.memories))
        part = Part(f"{name}_conv.kernel", c.memories, (3, 1, 0, 2), (c.memories, heads, size, c.conv_width))
        yield Link(theirs, (heads * size, 1, c.conv_width), (part,))
    yield vector("A_log", "A_log", heads)
    yield vector("dt_bias", "dt_bias", heads)
    yield vector("norm.scale", "o_norm.weight", c.values)


def each_memory(tensors, count):
    """The convolutions that memories share, once for each."""
    for name in ("k_conv1d.weight", "v_conv1d.weight"):
        tensors |= {f"{name}.{m}": tensors[name] for m in range(count)}
        del tensors[name]
    return tensors


CASES = {
    "fla_gla": (GatedLinearAttention(num_heads=2, key_dim=8, value_dim=16, gate_rank=4, temperature=4.0), gla_links),
    "fla_delta_net": (DeltaNet(num_heads=2, key_dim=8, value_dim=16), delta_net_links),
    "fla_gated_delta_net": (
        GatedDelta(num_heads=4, num_key_heads=2, key_dim=8, value_dim=12, negative_eigenvalues=True),
        gated_delta_links,
    ),
    "fla_kda": (KimiDelta(num_heads=4, key_dim=8, value_dim=12), kda_links),
    "fla_kda_bounded": (KimiDelta(num_heads=4, key_dim=8, value_dim=12, decay_bound=-5.0), kda_links),
    "fla_mom": (MixtureOfMemories(num_heads=2, key_dim=8, value_dim=16, num_memories=3, conv_width=1), mom_links),
}


@functools.cache
def golden(name):
    """What is stored, and our mixer with its weights."""
    with np.load(parity.golden_path(name)) as file:
        stored = {key: file[key] for key in file.files}
    shapes = {key: tuple(shape) for key, shape in json.loads(str(stored["shapes"])).items()}
    theirs = parity.weights(shapes, int(stored["seed"]))
    config, links = CASES[name]
    if isinstance(config, MixtureOfMemories):
        theirs = each_memory(theirs, config.memories)
    specs = config.build(BuildInfo(d_model=WIDTH, num_sub_layers=2, vocab_size=8))
    ours = read_all(links(config), theirs, {key: leaf.shape for key, leaf in named_leaves(specs)}, name)
    flat, tree = jax.tree_util.tree_flatten_with_path(specs)
    return stored, jax.tree_util.tree_unflatten(tree, [jnp.asarray(ours[path_name(path)]) for path, _ in flat])


def our_outputs(mixer, x, lengths):
    """Outputs (T, D) of each document alone, packed, and packed in the other order: one program for all."""
    parts = np.split(x, np.cumsum(lengths)[:-1])
    rows = [[parts[0]], [parts[1]], parts, parts[::-1]]
    x_BTD = np.zeros((len(rows), *x.shape), np.float32)
    segments, positions = (np.zeros(x_BTD.shape[:2], np.int32) for _ in range(2))
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, start=1):
            where = slice(start, start + len(document))
            x_BTD[row, where], segments[row, where], positions[row, where] = document, number, np.arange(len(document))
            start = where.stop
    context = Context(np.zeros_like(segments), segments, positions, Rules(None), False)
    program = jax.jit(lambda mixer, x, context: mixer(x, context)[0]).lower(mixer, x_BTD, context)
    out = np.asarray(program.compile()(mixer, x_BTD, context))
    first, second = lengths
    return {
        "alone": np.concatenate([out[0, :first], out[1, :second]]),
        "packed": out[2],
        "packed the other way": np.concatenate([out[3, second:], out[3, :second]]),
    }


@pytest.mark.parametrize("name", CASES)
def test_outputs(name):
    stored, mixer = golden(name)
    assert 1.0 < np.abs(stored["output"]).max() < 30.0
    assert stored["packed_error"] < TOLERANCE
    for how, found in our_outputs(mixer, stored["x"], stored["lengths"]).items():
        np.testing.assert_allclose(found, stored["output"], rtol=0, atol=TOLERANCE, err_msg=how)
