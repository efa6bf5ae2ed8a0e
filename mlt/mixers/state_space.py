"""Linear systems with constant diagonal dynamics (the S4 line): their poles, and two forms that compute them.

x' = lambda x + B u, y = Re(C x), held over a step of length Delta, is a recurrence h_t = e^(Delta lambda) h_{t-1} + b u_t, and
so a convolution whose kernel is C e^(Delta lambda l) b. The recurrence packs documents and decodes; the convolution, by FFT,
takes rows of one document only. Complex parameters and decoding states are pairs of reals in a last dim of two.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import mlt_kernels
import numpy as np
from flax import nnx

from mlt.errors import UserError
from mlt.mixers.base import Context, Kernel, save_point
from mlt.mixers.recurrent import Continuation, Row
from mlt.nn.param import Init, given, normal, param, uniform
from mlt.parallel.local import CHANNELS, HEADS, local

Poles = Literal["legs", "linear", "inverse", "real"]
Form = Literal["scan", "convolution"]
POLES_AT_A_TIME = 4


def legs_spectrum(order: int) -> tuple[np.ndarray, np.ndarray]:
    """The normal part of HiPPO-LegS: poles (order / 2,) with positive frequency and their eigenvectors (order, order / 2).

    A + p p^T with p_n = sqrt(n + 1/2) is -1/2 plus a skew matrix (arXiv 2111.00496). The other half is conjugate.
    """
    n = np.arange(order)
    p = np.sqrt(2 * n + 1.0)
    skew = np.tril(-np.outer(p, p), -1) / 2
    frequency, vectors = np.linalg.eigh(-1j * (skew - skew.T))
    positive = frequency > 0
    return -0.5 + 1j * frequency[positive], vectors[:, positive]


def poles(kind: Poles, count: int) -> np.ndarray:
    """`count` poles, one of each conjugate pair of a system of order N = 2 count (arXiv 2206.11893)."""
    n = np.arange(count)
    if kind == "legs":
        return legs_spectrum(2 * count)[0]
    if kind == "linear":
        return -0.5 + 1j * np.pi * n
    if kind == "inverse":
        return -0.5 + 2j * count / np.pi * (2 * count / (2 * n + 1) - 1)
    return -(n + 1.0) + 0j


def log_uniform(low: float, high: float) -> Init:
    """The logarithm of a step drawn log-uniformly from [low, high]."""
    return uniform(float(np.log(low)), float(np.log(high)))


def pair(value: np.ndarray) -> np.ndarray:
    """(..., 2) reals of a complex array."""
    return np.stack([np.real(value), np.imag(value)], -1)


def as_complex(value: Any) -> jax.Array:
    """complex64 of (..., 2) reals."""
    return jax.lax.complex(value[..., 0], value[..., 1])


def held(row: Row, name: str = "memory") -> jax.Array | None:
    """The complex state that decoding goes on from; None in a whole row."""
    return as_complex(row.state[name]) if isinstance(row, Continuation) else None


def hold(row: Row, last: jax.Array | None, name: str = "memory") -> None:
    """Keep the last complex state, if any, for the tokens to come."""
    if isinstance(row, Continuation) and last is not None:
        row.new[name] = jnp.stack([last.real, last.imag], axis=-1)


def recur(row: Row, a: jax.Array, b: jax.Array, start: jax.Array | None, backend: Kernel) -> tuple[jax.Array, Any]:
    """`diagonal_recurrence` of complex arrays: (h, last state, or None in a whole row)."""
    if start is None:
        return row.diagonal_recurrence(a, b, implementation=backend), None
    options = {"segment_ids": row.ctx.segment_ids, "implementation": backend}
    return mlt_kernels.diagonal_recurrence(a, b, initial_state=start, return_final_state=True, **options)


def takes_convolution(form: Form, row: Row) -> bool:
    """Whether to run as a convolution: decoding never does.

    Raises:
        UserError: the sequence is split over devices, which an FFT cannot be.
    """
    if form == "scan" or isinstance(row, Continuation):
        return False
    size = row.ctx.rules.size("seq")
    if size > 1:
        raise UserError(
            f"mesh.context = {size}: a state space layer in its convolution form needs whole sequences; use form='scan' or "
            "mesh.context=1"
        )
    return True


def convolve(ctx: Context, u_BTD: jax.Array, kernel_DT: jax.Array) -> jax.Array:
    """sum_l kernel[d, l] u_{t-l}, real or complex, zero-padded to twice the length so that nothing wraps round.

    A row with more than one document gives NaN, which training stops at: a convolution does not see where they end.
    """

    def run(u: jax.Array, kernel: jax.Array) -> jax.Array:
        T = u.shape[1]
        if jnp.iscomplexobj(u):
            spectrum = jnp.fft.fft(u, 2 * T, axis=1) * jnp.fft.fft(kernel.T, 2 * T, axis=0)
            return jnp.fft.ifft(spectrum, axis=1)[:, :T]
        spectrum = jnp.fft.rfft(u, 2 * T, axis=1) * jnp.fft.rfft(kernel.T, 2 * T, axis=0)
        return jnp.fft.irfft(spectrum, 2 * T, axis=1)[:, :T]

    u_BTD = jnp.where(ctx.is_token[..., None], u_BTD, jnp.zeros((), u_BTD.dtype))
    y_BTD = local(run, ctx.rules, (CHANNELS, (*HEADS, None)), CHANNELS)(u_BTD, kernel_DT)
    single_B = jnp.all((ctx.segment_ids == ctx.segment_ids[:, :1]) | ~ctx.is_token, axis=1)
    return jnp.where(single_B[:, None, None], y_BTD, jnp.nan)


class DiagonalCore(nnx.Module):
    """One system of `states` complex poles for each channel: S4D (arXiv 2206.11893), and DSS (arXiv 2203.14343).

        y_t = 2 Re sum_n C_n g_n h_t[n] + D u_t;   h_t[n] = e^(Delta lambda_n) h_{t-1}[n] + u_t

    The gain g is that of a zero-order hold, (e^(Delta lambda) - 1) / lambda, or, given `kernel_length` L, DSS's softmax over
    the L taps of a pole, (e^(Delta lambda) - 1) / (lambda (e^(L Delta lambda) - 1)). lambda = -exp(rate) + i frequency; C is
    a complex normal of variance 1, D a normal, log Delta uniform.
    """

    def __init__(
        self,
        channels: int,
        states: int,
        *,
        start: Poles,
        steps: tuple[float, float],
        form: Form,
        kernel_length: int | None = None,
        backend: Kernel = None,
    ):
        self.states, self.kernel_length, self.backend = states, kernel_length, backend
        self.form: Form = form
        lambdas, shape, axes = poles(start, states), (channels, states), ("heads", None)
        self.rate = param(shape, axes, given(np.log(-np.real(lambdas)), f"log of -re {start}"), group="vector")
        self.frequency = param(shape, axes, given(np.imag(lambdas), f"im {start}"), group="vector")
        self.readout = param((*shape, 2), (*axes, None), normal(0.5**0.5), group="vector")
        self.log_step = param((channels,), ("heads",), log_uniform(*steps), group="vector")
        self.skip = param((channels,), ("heads",), normal(1.0), group="vector")

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of the decoding state of one sequence."""
        return (*self.rate.shape, 2)

    def __call__(self, u_BTD: jax.Array, row: Row) -> jax.Array:
        """y (B, T, D), float32."""
        u_BTD = save_point(u_BTD.astype(jnp.float32), "recurrence_in")
        lambda_DN = jax.lax.complex(-jnp.exp(self.rate[...]), self.frequency[...])
        z_DN = lambda_DN * jnp.exp(self.log_step[...])[:, None]
        gain_DN = jnp.expm1(z_DN) / lambda_DN
        if self.kernel_length is not None:
            gain_DN = gain_DN / jnp.expm1(self.kernel_length * z_DN)
        readout_DN = 2 * as_complex(self.readout[...]) * gain_DN
        if takes_convolution(self.form, row):
            lags_T = jnp.arange(u_BTD.shape[1], dtype=jnp.float32)
            kernel_DT = jnp.sum((readout_DN[..., None] * jnp.exp(z_DN[..., None] * lags_T)).real, axis=1)
            y_BTD = convolve(row.ctx, u_BTD, kernel_DT)
        else:
            y_BTD = self._scan(u_BTD, jnp.exp(z_DN), readout_DN, row)
        return save_point(y_BTD, "recurrence_out") + self.skip[...] * u_BTD

    def _scan(self, u_BTD: jax.Array, a_DN: jax.Array, readout_DN: jax.Array, row: Row) -> jax.Array:
        """sum_n Re(readout_n h_t[n]). States of a few poles at a time exist for every token, and once more going back."""
        size = math.gcd(self.states, POLES_AT_A_TIME)
        cut = lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], -1, size), -2, 0)  # noqa: E731

        def few(y_BTD: jax.Array, part: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, Any]:
            a_DP, readout_DP, start = part
            shape = (*u_BTD.shape, size)
            b_BTDP = jnp.broadcast_to(u_BTD[..., None], shape).astype(a_DP.dtype)
            h_BTDP, last = recur(row, jnp.broadcast_to(a_DP, shape), b_BTDP, start, self.backend)
            return y_BTD + jnp.sum((readout_DP * h_BTDP).real, axis=-1), last

        start = held(row)
        parts = (cut(a_DN), cut(readout_DN), None if start is None else cut(start))
        y_BTD, last = jax.lax.scan(jax.checkpoint(few, prevent_cse=False), jnp.zeros_like(u_BTD), parts)
        if start is not None:
            hold(row, jnp.moveaxis(last, 0, -2).reshape(start.shape))
        return y_BTD
