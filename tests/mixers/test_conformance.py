"""Every mixer, found by its folder, against the shared catalogue: causality, packing, decoding, padding, odd lengths.

    MLT_FULL=1 python -m pytest tests/mixers/test_conformance.py

tries more lengths. A mixer that reads what others publish, or shares parameters, runs behind those others in a small stack
(`mlt.verify.material.described`). The outputs whose bits are compared are compiled as users compile them, with MLT_FULL their
gradients too; the rest without LLVM's optimization (`tests/conftest.py`).
"""

import dataclasses
import functools
import importlib
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_options import AS_USERS_DO

import mlt.mixers
from mlt.loss import context_of
from mlt.mixers.base import BuildInfo, ChannelMixerConfig, Context, MixerConfig, SequenceMixerConfig
from mlt.nn.param import ParamSpec, initialize, merge, named_leaves, partition
from mlt.parallel.rules import LOGICAL_TO_MESH, Rules
from mlt.verify.material import clusters_of, described, lively, packed_rows

FOLDER = pathlib.Path(mlt.mixers.__file__).parent
ROWS, LENGTH = 2, 96
FULL = bool(os.environ.get("MLT_FULL"))


def discover() -> list[type[MixerConfig]]:
    """The mixer configs of every file; a file that holds none, or one without an example, fails."""
    found = []
    for kind, base in (("sequence", SequenceMixerConfig), ("channel", ChannelMixerConfig)):
        for path in sorted((FOLDER / kind).glob("*.py")):
            if path.stem == "__init__":
                continue
            module = importlib.import_module(f"mlt.mixers.{kind}.{path.stem}")
            own = [
                value
                for value in vars(module).values()
                if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
            ]
            assert own, f"{path.name} defines no {base.__name__}"
            found += own
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    """A mixer with lively weights and its compiled forward pass."""

    config: MixerConfig
    info: BuildInfo

    @functools.cached_property
    def specs(self):
        return described(self.config, self.info)[0]

    @functools.cached_property
    def mixer(self):
        return lively(initialize(self.specs, 0), 1)

    @functools.cached_property
    def run(self):
        """(x, batch) -> y, compiled."""
        mixer = self.mixer
        return jax.jit(lambda x, batch: mixer(x, context(batch))[0], compiler_options=AS_USERS_DO)

    @functools.cached_property
    def run_quickly(self):
        """`run` for other lengths and types."""
        mixer = self.mixer
        return jax.jit(lambda x, batch: mixer(x, context(batch))[0])

    @functools.cached_property
    def gradients(self):
        """(x, batch, cotangent) -> gradients with respect to the parameters and x, losses of the mixer included; compiled."""
        trained, buffers = partition(self.mixer)

        def objective(trained, x, batch, cotangent):
            y, aux = merge(trained, buffers)(x, context(batch))
            return jnp.sum(y * cotangent) + sum(v for name, v in aux.items() if name.startswith("loss/"))

        return functools.partial(
            jax.jit(jax.grad(objective, argnums=(0, 1)), compiler_options=AS_USERS_DO if FULL else None), trained
        )

    def gradient(self, x, batch, cotangent):
        return self.gradients(x, batch, cotangent)[1]

    def batch(self, seed: int = 0, length: int = LENGTH) -> dict[str, np.ndarray]:
        rng, ids = np.random.default_rng(seed), self.info.vocab_size
        return packed_rows(rng, rows=ROWS, length=length, num_ids=ids, **clusters_of(self.config))

    def stream(self, seed: int = 0, length: int = LENGTH) -> np.ndarray:
        return np.random.default_rng(seed + 100).standard_normal((ROWS, length, self.info.d_model)).astype(np.float32)


def context(batch) -> Context:
    return context_of(batch, Rules(None), train=False)


CASES = {cls.__name__: Case(*cls.example()) for cls in discover()}


@pytest.fixture(params=CASES, scope="module")
def case(request) -> Case:
    return CASES[request.param]


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint32)


def replaced(case: Case, batch, x, where, seed: int):
    """The batch and stream with other tokens and values at `where`."""
    rng = np.random.default_rng(seed)
    tokens = np.where(where, rng.integers(0, case.info.vocab_size, where.shape), batch["tokens"]).astype(np.int32)
    values = np.where(where[..., None], rng.standard_normal(x.shape), x).astype(np.float32)
    return {**batch, "tokens": tokens}, values


def test_one_document_moves_no_bit_of_another(case):
    batch, x = case.batch(), case.stream()
    cotangent = case.stream(7)
    y, dx = case.run(x, batch), case.gradient(x, batch, cotangent)
    for segment in (1, 2, 3, 4):
        inside = np.zeros(batch["tokens"].shape, bool)
        inside[0] = batch["segment_ids"][0] == segment
        other, x2 = replaced(case, batch, x, inside, segment)
        y2, dx2 = case.run(x2, other), case.gradient(x2, other, cotangent)
        real = ~inside & (batch["segment_ids"] > 0)
        np.testing.assert_array_equal(bits(y)[real], bits(y2)[real])
        np.testing.assert_array_equal(bits(dx)[real], bits(dx2)[real])
        assert not np.array_equal(np.asarray(y)[inside], np.asarray(y2)[inside])


def test_a_packed_document_computes_what_it_computes_alone(case):
    batch, x = case.batch(), case.stream()
    y = np.asarray(case.run(x, batch))
    for segment in (2, 3, 4):
        where = np.flatnonzero(batch["segment_ids"][0] == segment)
        size = len(where)
        single = {name: np.zeros_like(value) for name, value in batch.items()}
        for name in batch:
            single[name][0, :size] = batch[name][0, where]
        single["segment_ids"][0, :size] = 1
        alone = np.zeros_like(x)
        alone[0, :size] = x[0, where]
        found = np.asarray(case.run(alone, single))[0, :size]
        np.testing.assert_allclose(found, y[0, where], rtol=0, atol=2e-5 * np.abs(y).max())


def test_no_output_depends_on_a_later_token(case):
    batch, x = case.batch(), case.stream()
    y = case.run(x, batch)
    for cut in (1, 17, 64, LENGTH - 1):
        later = np.broadcast_to(np.arange(LENGTH) >= cut, batch["tokens"].shape)
        other, x2 = replaced(case, batch, x, later, cut)
        y2 = case.run(x2, other)
        real = batch["segment_ids"][:, :cut] > 0
        np.testing.assert_array_equal(bits(y)[:, :cut][real], bits(y2)[:, :cut][real])


def test_padding_moves_no_bit(case):
    batch, x = case.batch(), case.stream()
    padding = batch["segment_ids"] == 0
    assert padding.any()
    other, x2 = replaced(case, batch, x, padding, 3)
    y, y2 = case.run(x, batch), case.run(x2, other)
    np.testing.assert_array_equal(bits(y)[~padding], bits(y2)[~padding])
    assert np.isfinite(np.asarray(y)).all()


@pytest.mark.parametrize("prefix", [1, 40] if FULL else [40])
def test_decoding_equals_the_full_pass(case, prefix):
    batch, x = case.batch(), case.stream()
    # The last row's padding in front of it, as prompts of several lengths have it.
    padding = int((batch["segment_ids"][-1] == 0).sum())
    assert padding
    for part in batch.values():
        part[-1] = np.roll(part[-1], padding, axis=0)
    mixer = case.mixer

    @jax.jit
    def stepwise(x, batch):
        part = lambda lo, hi: ({name: value[:, lo:hi] for name, value in batch.items()}, x[:, lo:hi])  # noqa: E731
        state = mixer.init_state(ROWS, LENGTH, jnp.dtype("float32"))
        head, x_head = part(0, prefix)
        first, state = mixer.step(x_head, state, context(head))

        def body(state, column):
            piece, x_one = column
            y, state = mixer.step(x_one[:, None], state, context({k: v[:, None] for k, v in piece.items()}))
            return state, y[:, 0]

        columns = jax.tree.map(lambda a: jnp.moveaxis(jnp.asarray(a), 1, 0), part(prefix, LENGTH))
        _, rest = jax.lax.scan(body, state, columns)
        return jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1)

    y, y2 = np.asarray(case.run(x, batch)), np.asarray(stepwise(x, batch))
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(y2[real], y[real], rtol=0, atol=2e-5 * np.abs(y).max())


@pytest.mark.parametrize("length", [1, 2, 63, 65] if FULL else [1, 65])
def test_odd_lengths_agree_with_a_longer_row(case, length):
    batch, x = case.batch(), case.stream()
    part = {name: value[:, :length] for name, value in batch.items()}
    short, y = np.asarray(case.run_quickly(x[:, :length], part)), np.asarray(case.run(x, batch))
    np.testing.assert_allclose(short, y[:, :length], rtol=0, atol=2e-5 * np.abs(y).max())


def test_bfloat16_stays_near_float32(case):
    batch, x = case.batch(), case.stream()
    y = np.asarray(case.run(x, batch))
    low = case.run_quickly(x.astype(jnp.bfloat16), batch)
    assert low.dtype == jnp.bfloat16
    real = batch["segment_ids"] > 0
    error = np.linalg.norm((np.asarray(low, np.float32) - y)[real], axis=-1) / np.linalg.norm(y[real], axis=-1)
    # A router or a top-k may turn over on a near tie; the typical token must not notice the type.
    assert np.median(error) < 0.02


def test_gradients_are_finite_and_none_is_missing(case):
    batch, x = case.batch(), case.stream()
    grads, dx = case.gradients(x, batch, case.stream(5))
    for name, grad in [*named_leaves(grads), ("x", dx)]:
        assert np.isfinite(np.asarray(grad)).all(), name
        assert np.asarray(grad).any(), f"{name} gets no gradient"


def test_parameters_are_described_in_float32_with_known_axes(case):
    for name, spec in named_leaves(case.specs):
        assert isinstance(spec, ParamSpec), name
        assert not spec.trainable or spec.dtype == "float32", name
        assert all(axis is None or axis in LOGICAL_TO_MESH for axis in spec.axes), name
        Rules(None).spec(spec.axes)
        never_decayed = ("norm", "scale", "bias", "A_log", "dt_bias", "sinks", "skip", "conv")
        if any(part in never_decayed for part in name.split(".")):
            assert spec.group == "vector", f"{name} would be decayed"


def test_the_reported_state_size_is_what_decoding_keeps(case):
    state = case.mixer.init_state(1, LENGTH, jnp.dtype("float32"))
    kept = sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
    configs = described(case.config, case.info)[1]
    assert sum(config.state_size(case.info.d_model, LENGTH) for config in configs) == kept


def test_costs_are_reported(case):
    assert case.config.flops_per_token(case.info.d_model, 64) > 0
    own = initialize(case.config.build(case.info), 0)
    sizes = [leaf.size for leaf in jax.tree.leaves(own)]
    buffers = [spec.size for _, spec in named_leaves(case.config.build(case.info)) if not spec.trainable]
    assert case.config.param_count(case.info) == sum(sizes) - sum(buffers)


CHANNEL = [name for name, case in CASES.items() if isinstance(case.config, ChannelMixerConfig)]


@pytest.mark.parametrize("name", CHANNEL)
def test_a_channel_mixer_sees_only_its_left_context(name):
    case = CASES[name]
    batch, x = case.batch(), case.stream()
    batch["segment_ids"][:], batch["positions"][:] = 1, np.arange(LENGTH)
    reach = case.config.left_context
    t = 60
    outside = np.ones(batch["tokens"].shape, bool)
    outside[:, t - reach : t + 1] = False
    other, x2 = replaced(case, batch, x, outside, 11)
    np.testing.assert_array_equal(bits(case.run(x, batch))[:, t], bits(case.run(x2, other))[:, t])
