"""Every mixer, found by its folder, over random layouts of 8 devices: output and gradients are those of one device.

    MLT_LAYOUTS=1 python -m pytest tests/mesh/test_mixers.py

tries that many layouts for each mixer (minutes). Without the variable only a few are tried, one layout each; those of the
quickstart are tried together in `test_equal_one_device.py`.
"""

import importlib
import itertools
import os
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlt.mixers
from mlt.config.check import CROSSINGS
from mlt.loss import context_of
from mlt.mixers.base import ChannelMixerConfig, SequenceMixerConfig
from mlt.nn.param import initialize, merge, named_leaves, partition
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules
from mlt.verify.material import clusters_of, described, lively, packed_rows
from mlt.verify.mesh import ROUNDINGS, TOLERANCE, distance

FOLDER = pathlib.Path(mlt.mixers.__file__).parent
ROWS, LENGTH, DEVICES = 8, 48, 8
LAYOUTS = int(os.environ.get("MLT_LAYOUTS", "0"))
QUICK = ("MLSTM", "DifferentialAttention", "Retention")
AXES = ("fsdp", "expert", "context", "tensor")


def discover() -> dict[str, type]:
    found = {}
    for kind, base in (("sequence", SequenceMixerConfig), ("channel", ChannelMixerConfig)):
        for path in sorted((FOLDER / kind).glob("[!_]*.py")):
            for value in vars(importlib.import_module(f"mlt.mixers.{kind}.{path.stem}")).values():
                if isinstance(value, type) and issubclass(value, base) and value.__module__.endswith(f".{path.stem}"):
                    found[value.__name__] = value
    return found


MIXERS = discover()


def layouts(config, specs, seed: int) -> list[Layout]:
    """Random degrees that fit the mixer, sequence shards among them wherever it takes them."""
    whole = isinstance(config, SequenceMixerConfig) and config.context not in CROSSINGS
    fitting = []
    for degrees in itertools.product((1, 2, 4, 8), repeat=len(AXES)):
        layout = Layout(**dict(zip(AXES, degrees, strict=True)))
        if layout.num_devices == DEVICES and (layout.context > 1) != whole and not layout.abstract_rules().indivisible(specs):
            fitting.append(layout)
    assert fitting, "no layout of 8 devices fits the example"
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(fitting), min(max(LAYOUTS, 1), len(fitting)), replace=False)
    return [fitting[i].replace(carry=rng.choice(["gather", "permute", "ring"])) for i in chosen]


def outcome(mixer, specs, batch, x, cotangent, rules: Rules) -> dict[str, np.ndarray]:
    """Output, and gradients of the stream and of every parameter, by name."""
    trained, buffers = partition(mixer)
    if rules.mesh is not None:
        trained = jax.device_put(trained, rules.param_shardings(partition(specs)[0]))
        place = rules.sharding(("batch", "seq"))
        batch = jax.device_put(batch, place)
        x, cotangent = (jax.device_put(a, rules.sharding(("batch", "seq", "stream"))) for a in (x, cotangent))

    def objective(trained, x, batch, cotangent):
        ctx = context_of(batch, rules, train=True)
        y, aux = merge(trained, buffers)(x, ctx)
        y = jnp.where((batch["segment_ids"] > 0)[..., None], rules.constrain(y, ("batch", "seq", "stream")), 0)
        return jnp.sum(y * cotangent) + sum(v for name, v in aux.items() if name.startswith("loss/")), y

    with jax.default_matmul_precision("highest"):
        run = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
        (grads, dx), y = run(trained, x, batch, cotangent)
    return {"y": np.asarray(y), "dx": np.asarray(dx)} | {name: np.asarray(leaf) for name, leaf in named_leaves(grads)}


@pytest.mark.parametrize("name", [name for name in MIXERS if LAYOUTS or name in QUICK])
def test_random_layouts_equal_one_device(name):
    config, info = MIXERS[name].example()
    specs = described(config, info)[0]
    mixer = lively(initialize(specs, 0), 1)
    rng = np.random.default_rng(2)
    batch = packed_rows(rng, rows=ROWS, length=LENGTH, num_ids=info.vocab_size, **clusters_of(config))
    x, cotangent = rng.standard_normal((2, ROWS, LENGTH, info.d_model)).astype(np.float32)
    expected = outcome(mixer, specs, batch, x, cotangent, Rules(None))
    shaken = outcome(mixer, specs, batch, x * (1 + np.float32(2.0**-23)), cotangent, Rules(None))
    for layout in layouts(config, specs, zlib.crc32(name.encode())):
        found = outcome(mixer, specs, batch, x, cotangent, layout.rules())
        degrees = {axis: n for axis, n in layout.shape().items() if n > 1}
        for key, value in expected.items():
            bound = max(TOLERANCE, ROUNDINGS * distance(shaken[key], value))
            error = distance(found[key], value)
            assert error <= bound, f"{degrees} {layout.carry}: {key}: {error:.1e}, bound {bound:.1e}"
