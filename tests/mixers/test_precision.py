"""What stays float32 while the stream is bfloat16, in every recurrent mixer, and that rounding does not grow with the row.

The recurrence of a Mamba has no positive Lyapunov exponent (arXiv 2406.00209): what a rounding error does to the state only
fades, so that bfloat16 activations are safe. That says nothing of decays, their sums and states: a decay of 0.999 is 1.0 in
bfloat16. Here the program that a mixer makes of a bfloat16 stream is searched for them.
"""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlt.mixers.sequence
from mlt.mixers.base import BuildInfo, Context, SequenceMixerConfig
from mlt.mixers.recurrent import RecurrentMixer
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.mixers.sequence.kimi_delta import KimiDelta
from mlt.mixers.sequence.mamba import Mamba
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.nn.param import initialize, named_leaves
from mlt.parallel.rules import Rules
from mlt.plan.primitives import scan_parts
from mlt.verify.material import lively

WIDE_ONLY = ("exp", "exp2", "log", "log1p", "expm1", "cumsum", "cumlogsumexp", "cumprod", "sqrt", "rsqrt")
"""What gates, decays, sums along the sequence, norms and softmax are made of."""


def examples() -> dict[str, tuple[SequenceMixerConfig, BuildInfo]]:
    found = {}
    for path in sorted(pathlib.Path(mlt.mixers.sequence.__path__[0]).glob("[!_]*.py")):
        module = importlib.import_module(f"mlt.mixers.sequence.{path.stem}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, SequenceMixerConfig) and value.__module__ == module.__name__:
                found[value.__name__] = value.example()
    return {name: pair for name, pair in found.items() if pair[0].context in ("carry", "none") and is_recurrent(*pair)}


def is_recurrent(config, info) -> bool:
    return isinstance(config.build(info), RecurrentMixer)


EXAMPLES = examples()


def row(width: int, length: int, dtype=jnp.float32, seed: int = 0):
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((1, length, width)), dtype)
    ones = np.ones((1, length), np.int32)
    return x, Context(0 * ones, ones, np.arange(length, dtype=np.int32)[None], Rules(None), False)


def equations(jaxpr):
    """Every equation of a program, those of loops, branches and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def low(variable) -> bool:
    return getattr(variable.aval, "dtype", None) == jnp.bfloat16


def only_written(body, variable) -> bool:
    """Whether a loop puts results into an array and never looks at it."""
    readers = [equation for equation in body.eqns if any(v is variable for v in equation.invars)]
    return all(
        equation.primitive.name == "dynamic_update_slice" and not any(v is variable for v in equation.invars[1:])
        for equation in readers
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_states_decays_and_sums_are_float32_under_a_bfloat16_stream(name):
    config, info = EXAMPLES[name]
    mixer = initialize(config.build(info), 0)
    x, ctx = row(info.d_model, 80, jnp.bfloat16)
    program = jax.make_jaxpr(lambda x: mixer(x, ctx)[0])(x)
    assert program.out_avals[0].dtype == jnp.bfloat16
    for equation in equations(program.jaxpr):
        kind = equation.primitive.name
        if kind in WIDE_ONLY:
            assert not any(low(v) for v in equation.outvars), f"{kind} in bfloat16: {equation}"
        if kind == "scan":
            first, count = scan_parts(equation)
            body, carried = equation.params["jaxpr"].jaxpr, equation.invars[first : first + count]
            narrow = [v.aval for i, v in enumerate(carried) if low(v) and not only_written(body, body.invars[first + i])]
            assert not narrow, f"a loop carries bfloat16: {narrow}"
        if kind in ("reduce_sum", "dot_general") and any(low(v) for v in equation.invars):
            # A sum of bfloat16 products is one number of a projection; along the sequence it must be kept in float32.
            sizes = _summed(equation)
            assert not any(80 in (size, size + 1) for size in sizes) or not low(equation.outvars[0]), f"{equation}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_decoding_states_and_parameters_are_float32(name):
    config, info = EXAMPLES[name]
    mixer = initialize(config.build(info), 0)
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for _, leaf in named_leaves(mixer))
    state = mixer.init_state(1, 32, jnp.dtype("bfloat16"))
    x, ctx = row(info.d_model, 1, jnp.bfloat16)
    after = jax.eval_shape(lambda x, state: mixer.step(x, state, ctx)[1], x, state)
    before = {n: leaf.dtype for n, leaf in named_leaves(state)}
    assert before == {n: leaf.dtype for n, leaf in named_leaves(after)}
    kept = ("memory", "h", "c", "n", "m", "sum", "trace", "average", "codes")
    for leaf_name, dtype in before.items():
        if leaf_name.split(".")[0] in kept and leaf_name.split(".")[-1] not in ("segment", "position", "length"):
            assert dtype in (jnp.float32, jnp.int32), leaf_name


STABLE = [
    Mamba2(num_heads=2, head_dim=4, state_dim=8),
    Mamba(state_dim=4),
    GatedDelta(num_heads=2, key_dim=8, negative_eigenvalues=True),
    KimiDelta(num_heads=2, key_dim=8),
]


@pytest.mark.parametrize("config", STABLE, ids=lambda config: type(config).__name__)
def test_a_perturbation_fades_along_the_row(config):
    """The first token moves by a rounding error of bfloat16; what it does to outputs is largest in the beginning."""
    mixer = lively(initialize(config.build(BuildInfo(d_model=8, num_sub_layers=1, vocab_size=4)), 0), 1)
    x, ctx = row(8, 768)
    moved = x.at[:, 0].multiply(1 + 2.0**-8)
    run = jax.jit(lambda x: mixer(x, ctx)[0])
    away = np.linalg.norm(np.asarray(run(moved) - run(x))[0], axis=-1)
    parts = away.reshape(3, 256).max(1)
    assert parts[0] > 0
    assert parts[1] <= parts[0]
    assert parts[2] <= parts[0]


def _summed(equation) -> list[int]:
    shape = equation.invars[0].aval.shape
    if equation.primitive.name == "reduce_sum":
        return [shape[axis] for axis in equation.params["axes"]]
    return [shape[axis] for axis in equation.params["dimension_numbers"][0][0]]
