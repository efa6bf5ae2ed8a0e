"""What crosses devices, read in the compiled programs: states of a fixed size, halos of their width, no whole sequence."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_options import FUSED
from tool_files import tool

from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.short_conv import ShortConv
from mlt.nn.param import initialize
from mlt.parallel import carry
from mlt.parallel.mesh import Layout
from mlt.plan.collectives import collectives

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart.py"
SHARDS, D = 8, 16
INFO = BuildInfo(d_model=D, num_sub_layers=2, vocab_size=32)


golden = tool("golden")


def sent(config, length: int, *, gradient: bool, **strategies):
    """Collectives of a mixer over 8 sequence shards."""
    rules = Layout(context=SHARDS, **strategies).rules(jax.devices()[:SHARDS])
    mixer = initialize(config.build(INFO), 0)
    ids = np.ones((1, length), np.int32)
    ctx = Context(*(jax.device_put(ids, rules.sharding(("batch", "seq"))) for _ in range(3)), rules, False)
    x = jax.device_put(np.ones((1, length, D), np.float32), rules.sharding(("batch", "seq", None)))

    def run(x, ctx):
        return rules.constrain(mixer(x, ctx)[0], ("batch", "seq", "stream"))

    if gradient:
        run = jax.grad(lambda x, ctx, run=run: jnp.sum(run(x, ctx) ** 2))
    return collectives(jax.jit(run).lower(x, ctx).compile(FUSED).as_text())


@pytest.mark.parametrize("exchange", carry.EXCHANGES)
def test_recurrences_send_the_same_however_long_the_sequence(exchange):
    config = GatedDelta(num_heads=2, key_dim=8) if exchange == "gather" else Mamba2(num_heads=2, head_dim=8, state_dim=8)
    short, long = (sent(config, length, gradient=True, carry=exchange) for length in (64, 256))
    assert sum(c.bytes for c in short) == sum(c.bytes for c in long) > 0


@pytest.mark.parametrize("width", [2, 5])
def test_a_halo_moves_its_width(width):
    found = sent(ShortConv(width=width), 64, gradient=False)
    # The inputs in front of the shard, and the segment ids that say whose they are.
    inputs, ids = (width - 1) * D * 4, (width - 1) * 4
    assert {c.kind for c in found} == {"collective-permute"}
    assert sorted(c.bytes for c in found) == [ids, inputs]


@pytest.fixture(scope="module")
def step():
    return golden.sending_step(CONFIG)


def test_no_device_gathers_a_sequence_or_logits(step):
    length, vocab = int(golden.SENDING["sequence_length"]), 272
    found = step.collectives()
    assert found
    for c in found:
        for kind, dims in c.shapes:
            assert length not in dims, f"{c.kind} {kind}{list(dims)} from {c.source}"
            assert vocab not in dims or len(dims) == 2, f"{c.kind} {kind}{list(dims)} from {c.source}"


def test_the_step_sends_what_it_sent_yesterday(step):
    expected = golden.collectives_path(CONFIG).read_text()
    version = expected.split(",")[0].removeprefix("jax ")
    if jax.__version__ != version:
        pytest.skip(f"the golden text is that of jax {version}")
    assert golden.collectives_text(step) == expected, "run tools/golden.py --collectives and say why it changed"
