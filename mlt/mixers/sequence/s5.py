"""S5 and LRU (arXiv 2208.04933, 2303.06349): one diagonal linear system for the whole stream, all inputs to all outputs."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_divisor, not_positive
from mlt.mixers.state_space import (
    Form,
    as_complex,
    convolve,
    held,
    hold,
    legs_spectrum,
    log_uniform,
    pair,
    recur,
    takes_convolution,
)
from mlt.nn.linear import Linear
from mlt.nn.param import Init, fan_in, given, normal, param

HIGHEST_REAL_PART = -1e-4


class S5(SequenceMixerConfig):
    """h_t = e^(Delta lambda) h_{t-1} + (e^(Delta lambda) - 1) / lambda (B x_t);  y_t = 2 Re(C h_t) + D x_t

    out = y sigmoid(gelu(y) W), the half-GLU of the released code. lambda and Delta are a number a state, B and C complex.
    lambda starts as `num_blocks` copies of the spectrum of HiPPO-LegS of order 2 num_states / num_blocks, B and C as real
    normal matrices of variance 1 / fan-in in the basis of their eigenvectors. Real parts stay at or below -1e-4.

    Attributes:
        num_states: complex states, half the order of the real system.
        num_blocks: of the first spectrum, a divisor of num_states.
        min_step, max_step: of the step sizes at the start.
        step_scale: factor on every step, for inputs of another sampling rate.
        form: `scan`, or `convolution`: an FFT over rows that hold one document only; other rows give NaN.
        kernel: backend of the recurrence.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "diagonal_recurrence"

    num_states: int
    num_blocks: int = 1
    min_step: float = 1e-3
    max_step: float = 0.1
    step_scale: float = 1.0
    form: Form = "scan"

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "num_states", "num_blocks"))
        yield from sizes or not_divisor(self, "num_blocks", "num_states")
        if not 0 < self.min_step < self.max_step:
            yield Problem("min_step", self.min_step, f"must be between 0 and max_step = {self.max_step}")
        if self.step_scale <= 0:
            yield Problem("step_scale", self.step_scale, "must be positive")

    def whole_rows(self) -> str | None:
        return None if self.form == "scan" else "set its form='scan'"

    def build(self, info: BuildInfo) -> "S5Mixer":
        return S5Mixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return 2 * d_model * d_model + 8 * d_model * self.num_states + 14 * self.num_states

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 2 * self.num_states

    @classmethod
    def example(cls) -> tuple["S5", BuildInfo]:
        return cls(num_states=16, num_blocks=2), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class LRU(SequenceMixerConfig):
    """h_t = lambda h_{t-1} + gamma (B x_t);  y_t = Re(C h_t) + D x_t;  out = (g W_a) * sigmoid(g W_b) with g = gelu(y)

    lambda = exp(-exp(nu) + i exp(theta)) starts uniformly on a ring, gamma = sqrt(1 - |lambda|^2).

    Attributes:
        num_states: complex states.
        min_radius, max_radius: of the ring, both in [0, 1).
        max_phase: angles start in (0, max_phase).
        form: `scan`, or `convolution`: an FFT over rows that hold one document only; other rows give NaN.
        kernel: backend of the recurrence.
    """

    context: ClassVar[str] = "carry"
    op: ClassVar[str] = "diagonal_recurrence"

    num_states: int
    min_radius: float = 0.9
    max_radius: float = 0.999
    max_phase: float = 6.28
    form: Form = "scan"

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_states")
        if not 0 <= self.min_radius < self.max_radius < 1:
            yield Problem("min_radius", self.min_radius, f"must be in [0, max_radius), max_radius = {self.max_radius} below 1")
        if self.max_phase <= 0:
            yield Problem("max_phase", self.max_phase, "must be positive")

    def whole_rows(self) -> str | None:
        return None if self.form == "scan" else "set its form='scan'"

    def build(self, info: BuildInfo) -> "LRUMixer":
        return LRUMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return 4 * d_model * d_model + 8 * d_model * self.num_states + 14 * self.num_states

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 2 * self.num_states

    @classmethod
    def example(cls) -> tuple["LRU", BuildInfo]:
        return cls(num_states=16), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class SharedSystem(RecurrentMixer):
    """y_t = Re(C h_t) + D x_t of h_t = a h_{t-1} + g * (B x_t), with a and g of the subclass."""

    config: S5 | LRU

    def __init__(self, config: S5 | LRU, info: BuildInfo, write: Init, read: Init):
        self.config = config
        d, states = info.d_model, config.num_states
        self.write = param((d, states, 2), ("embed", "heads", None), write, group="vector")
        self.read = param((states, d, 2), ("heads", "embed", None), read, group="vector")
        self.skip = param((d,), (None,), normal(1.0), group="vector")

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        return empty_state(batch, dtype, memory=(self.config.num_states, 2))

    def system(self, x_BTD: jax.Array, log_a_P: jax.Array, gain_P: jax.Array, row: Row) -> jax.Array:
        """y (B, T, D) in the type of x."""
        dtype = x_BTD.dtype
        written = jnp.einsum("btd,dpc->btpc", x_BTD, self.write[...].astype(dtype), preferred_element_type=jnp.float32)
        b_BTP = save_point(gain_P * as_complex(written), "recurrence_in")
        if takes_convolution(self.config.form, row):
            lags_T = jnp.arange(x_BTD.shape[1], dtype=jnp.float32)
            h_BTP = convolve(row.ctx, b_BTP, jnp.exp(log_a_P[:, None] * lags_T))
        else:
            a_BTP = jnp.broadcast_to(jnp.exp(log_a_P), b_BTP.shape)
            h_BTP, last = recur(row, a_BTP, b_BTP, held(row), self.config.kernel)
            hold(row, last)
        h_BTP = save_point(h_BTP, "recurrence_out")
        # Re(C h) is the real product of the parts, the imaginary ones with a minus.
        parts = jnp.stack([h_BTP.real, -h_BTP.imag], axis=-1).astype(dtype)
        y_BTD = jnp.einsum("btpc,pdc->btd", parts, self.read[...].astype(dtype))
        return (y_BTD + self.skip[...] * x_BTD).astype(dtype)


class S5Mixer(SharedSystem):
    config: S5

    def __init__(self, config: S5, info: BuildInfo):
        block, vectors = legs_spectrum(2 * config.num_states // config.num_blocks)
        super().__init__(config, info, _into_basis(vectors, config.num_blocks), _from_basis(vectors, config.num_blocks))
        lambdas = np.tile(block, config.num_blocks)
        self.real = param((config.num_states,), ("heads",), given(np.real(lambdas), "re legs"), group="vector")
        self.frequency = param((config.num_states,), ("heads",), given(np.imag(lambdas), "im legs"), group="vector")
        steps = log_uniform(config.min_step, config.max_step)
        self.log_step = param((config.num_states,), ("heads",), steps, group="vector")
        self.gate = Linear((("embed", info.d_model),), (("heads", info.d_model),))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        lambda_P = jax.lax.complex(jnp.minimum(self.real[...], HIGHEST_REAL_PART), self.frequency[...])
        z_P = lambda_P * jnp.exp(self.log_step[...]) * self.config.step_scale
        y_BTD = self.system(x_BTD, z_P, 2 * jnp.expm1(z_P) / lambda_P, row)
        return y_BTD * jax.nn.sigmoid(self.gate(jax.nn.gelu(y_BTD, approximate=False)))


class LRUMixer(SharedSystem):
    def __init__(self, config: LRU, info: BuildInfo):
        d, states = info.d_model, config.num_states
        super().__init__(config, info, normal((2 * d) ** -0.5), normal(states**-0.5))
        self.log_rate = param((states,), ("heads",), _log_rate(config.min_radius, config.max_radius), group="vector")
        self.log_phase = param((states,), ("heads",), _log_phase(config.max_phase), group="vector")
        self.output = Linear((("embed", d),), (("heads", d),), init=fan_in(d, scale=info.residual_scale))
        self.gate = Linear((("embed", d),), (("heads", d),))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        rate_P = jnp.exp(self.log_rate[...])
        gamma_P = jnp.sqrt(-jnp.expm1(-2 * rate_P))
        y_BTD = self.system(x_BTD, jax.lax.complex(-rate_P, jnp.exp(self.log_phase[...])), gamma_P, row)
        y_BTD = jax.nn.gelu(y_BTD, approximate=False)
        return self.output(y_BTD) * jax.nn.sigmoid(self.gate(y_BTD))


def _into_basis(vectors: np.ndarray, blocks: int) -> Init:
    """(D, P, 2): a real normal matrix (N, D) of variance 1 / D, in the basis of the eigenvectors (N / blocks, P / blocks)."""

    def fn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        real = rng.standard_normal((blocks, len(vectors), shape[0])) * shape[0] ** -0.5
        return pair(np.einsum("np,jnd->djp", vectors.conj(), real).reshape(shape[:2]))

    return Init("normal in the eigenbasis", fn)


def _from_basis(vectors: np.ndarray, blocks: int) -> Init:
    """(P, D, 2): a real normal matrix (D, N) of variance 1 / N, from the basis of the eigenvectors."""

    def fn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        real = rng.standard_normal((shape[1], blocks, len(vectors))) * (blocks * len(vectors)) ** -0.5
        return pair(np.einsum("djn,np->jpd", real, vectors).reshape(shape[:2]))

    return Init("normal from the eigenbasis", fn)


def _log_rate(low: float, high: float) -> Init:
    """log(-log radius), the radius squared being uniform in [low^2, high^2]."""
    return Init(f"log_ring({low:g}, {high:g})", lambda rng, shape: np.log(-0.5 * np.log(rng.uniform(low**2, high**2, shape))))


def _log_phase(high: float) -> Init:
    return Init(f"log_phase({high:g})", lambda rng, shape: np.log(high * (1.0 - rng.uniform(0.0, 1.0, shape))))
