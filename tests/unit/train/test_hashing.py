"""Rows hashed on the host: those of the program to the bit, and a step that has them moves as one that hashes."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.config.check import check_run
from mlt.config.load import load_config
from mlt.config.problems import ConfigError
from mlt.config.run import RunConfig
from mlt.data.loader import load_corpus, open_loader
from mlt.data.synthetic import SyntheticText
from mlt.loss import context_of
from mlt.mixers.base import BuildInfo
from mlt.mixers.channel.engram import Engram
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.nn.param import initialize
from mlt.optim.lazy_adam import LazyAdam
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules
from mlt.parallel.table import rows_in
from mlt.train.feed import Feed
from mlt.train.hashing import HostHashes
from mlt.train.setup import build_optimizer, describe_model, step_options
from mlt.train.state import abstract_batch, abstract_state, create_state
from mlt.train.step import train_step
from mlt.verify.material import packed_rows

ROWS, LENGTH = 8, 24


def engram(number: int, **fields) -> Engram:
    settings = {"rows_per_head": 700, "head_dim": 8, "heads_per_order": 2, "hash_on": "host", "pad_token_id": 258}
    return Engram(layer_id=number, layer_ids=(0, 3), **settings | fields)


def small(*layers: Engram, tables=None) -> RunConfig:
    config = load_config("tests/faults/tiny.py")
    stack = Stack(head=(Block(mixers=layers[:1]),), period=(Block(mixers=layers[1:]),), repeats=2)
    return config.replace(
        model=LMConfig(d_model=16, vocab_size=272, stack=stack),
        data=config.data.replace(source=SyntheticText(num_documents=40), batch_size=ROWS, sequence_length=LENGTH),
        optimizer=config.optimizer.replace(tables=tables),
    )


CONFIG = small(engram(0), engram(3, max_ngram=4, cross_document=True), tables=LazyAdam())


def batch_of(seed: int = 0) -> dict[str, np.ndarray]:
    batch = packed_rows(np.random.default_rng(seed), rows=ROWS, length=LENGTH, num_ids=259)
    batch["tokens"][0, 5] = -1
    return batch


def joined(rows) -> np.ndarray:
    return np.asarray(rows) if not isinstance(rows, tuple) else (np.asarray(rows[0], np.int64) << 32) | np.asarray(rows[1])


@pytest.mark.parametrize("fields", [{}, {"cross_document": True, "max_ngram": 4}, {"compress_tokens": False}])
def test_rows_are_those_of_the_program_to_the_bit(fields):
    layer = engram(0, **fields)
    hashes, batch = HostHashes(small(layer, engram(3))), batch_of()
    info = BuildInfo(16, 3, 272, CONFIG.data.tokenizer.token_strings())
    mixer = initialize(layer.build(info), 0)
    run = jax.jit(lambda mixer, batch: mixer.rows(mixer.compressed(batch["tokens"]), batch["segment_ids"]))
    got, want = rows_in(hashes(batch))["engram_0"], run(mixer, batch)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_rows_beyond_32_bits_are_the_same_words():
    layer = engram(0, rows_per_head=2**30, compress_tokens=False)
    config, batch = small(layer, engram(3)), batch_of()
    mixer = layer.build(BuildInfo(16, 3, 272))
    high_low = rows_in(HostHashes(config)(batch))["engram_0"]
    words = HostHashes(config).layers["engram_0"].words_N2
    want = jax.jit(lambda ids, segments: mixer._hash(ids, segments, jnp.asarray(words), 258))(
        batch["tokens"], batch["segment_ids"]
    )
    assert (joined(high_low) >= 2**31).any()
    np.testing.assert_array_equal(joined(high_low), joined(want))


class Step:
    """A step of the config on a layout, with rows from the host or without."""

    def __init__(self, layout: Layout, *, host: bool):
        self.rules, specs = layout.rules(jax.devices()[: layout.num_devices]), describe_model(CONFIG)
        optimizer = build_optimizer(CONFIG, specs)
        places = jax.tree.map(lambda x: x.sharding, abstract_state(specs, optimizer, self.rules))
        options = step_options(CONFIG, self.rules, specs)
        self.hashes = HostHashes(CONFIG) if host else lambda batch: batch
        self.feed = Feed(self.rules, ROWS, LENGTH)
        self.start = create_state(specs, optimizer, self.rules, seed=0)
        shapes = abstract_batch(self.rules, ROWS, LENGTH, self.hashes.fields() if host else None)
        step = jax.jit(functools.partial(train_step, optimizer=optimizer, options=options), out_shardings=(places, None))
        self.lowered = step.lower(self.start, shapes)
        self.compiled = self.lowered.compile()

    def run(self, steps: int = 2):
        state = self.start
        for number in range(steps):
            batch = batch_of(number)
            batch["tokens"] = np.maximum(batch["tokens"], 0)
            state, metrics = self.compiled(state, self.feed(self.hashes(batch)))
        return state, metrics


@pytest.mark.skipif(not os.environ.get("MLT_FULL"), reason="half a minute; MLT_FULL=1 runs it")
@pytest.mark.parametrize("layout", [Layout(), Layout(fsdp=2, context=4)], ids=["one", "shards"])
def test_a_step_with_rows_from_the_host_is_the_step_that_hashes(layout):
    host, device = Step(layout, host=True), Step(layout, host=False)
    for a, b in zip(jax.tree.leaves(host.run()), jax.tree.leaves(device.run()), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))
    # The remainder of 64 bits by the primes is in the program that hashes alone.
    found = [re.findall(r"stablehlo.remainder .*xi64>", step.lowered.as_text()) for step in (host, device)]
    assert [bool(lines) for lines in found] == [False, True]


def test_the_loader_s_threads_add_the_rows():
    corpus, hashes = load_corpus(CONFIG.data), HostHashes(CONFIG)
    ahead, plain = (open_loader(CONFIG.data, corpus, extend=extend) for extend in (hashes, None))
    for _ in range(3):
        got, want = next(ahead), next(plain)
        assert set(got) - set(want) == {"rows/engram_0", "rows/engram_3"}
        for name, array in hashes(want).items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)
    ahead.close(), plain.close()


def test_a_process_of_several_places_its_part_of_the_rows():
    rows = np.random.default_rng(0).integers(0, 99, (ROWS, LENGTH, 4)).astype(np.int32)
    placed = Feed(Layout(fsdp=2, context=4).rules(), ROWS, LENGTH)._place(rows)
    np.testing.assert_array_equal(placed, rows)
    assert placed.addressable_shards[0].data.shape == (ROWS // 2, LENGTH // 4, 4)


def test_layers_of_one_number_that_differ_are_refused():
    with pytest.raises(ConfigError, match=r"period\[0\].mixers\[0\].layer_id .* head\[0\].mixers\[0\], which differs"):
        check_run(small(engram(0), engram(0, max_ngram=4)))
    check_run(small(engram(0), engram(0)))


def test_shards_take_the_rows_of_the_host():
    """Sequence shards hash with a halo; rows from the host were hashed in whole rows. The outputs are the same bits."""
    rules, layer = Layout(fsdp=2, context=4).rules(), engram(0)
    mixer = layer.build(BuildInfo(16, 3, 272, CONFIG.data.tokenizer.token_strings()))
    mixer = initialize(mixer, 0, rules.param_shardings(mixer))
    feed, batch = Feed(rules, ROWS, LENGTH), batch_of()
    x = jax.device_put(np.random.default_rng(0).standard_normal((ROWS, LENGTH, 16)), rules.sharding(("batch", "seq", "stream")))
    run = jax.jit(lambda mixer, batch: mixer(x, context_of(batch, rules, train=True))[0])
    hashed = HostHashes(small(layer, engram(3)))(batch)
    np.testing.assert_array_equal(run(mixer, feed(hashed)), run(mixer, feed(batch)))


def test_a_call_without_rows_hashes_for_itself():
    layer, batch = engram(0), batch_of()
    mixer = initialize(layer.build(BuildInfo(16, 3, 272, CONFIG.data.tokenizer.token_strings())), 0)
    x = np.random.default_rng(0).standard_normal((ROWS, LENGTH, 16)).astype(np.float32)
    run = jax.jit(lambda mixer, batch: mixer(x, context_of(batch, Rules(), train=True))[0])
    hashed = HostHashes(small(layer, engram(3)))(batch)
    np.testing.assert_array_equal(run(mixer, batch), run(mixer, {k: v for k, v in hashed.items() if "engram_3" not in k}))
