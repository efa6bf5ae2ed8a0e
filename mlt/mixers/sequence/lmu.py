"""LMU (the memory of LMUFormer, ICLR 2024): the last inputs as Legendre coefficients, by a linear system that is fixed."""

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from mlt_kernels.segments import starts

from mlt.config.problems import Problem
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.recurrent import Continuation, RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_positive
from mlt.nn.linear import Linear
from mlt.nn.param import fan_in
from mlt.parallel import carry, sequence
from mlt.parallel.local import TOKENS, local

CHUNK = 32
"""Tokens that are combined by matrix products; between chunks the state is carried one by one."""


class LMU(SequenceMixerConfig):
    """u_t = relu(x_t W_u);  m_t = A m_{t-1} + B u_t;  out = W_o relu(m_t W_m + x_t W_x)

    A and B are the zero-order hold, over one token, of the system whose state is the last `window` inputs in shifted
    Legendre polynomials; they are not trained. Each of the `num_inputs` signals has a memory of its own.

    Attributes:
        order: coefficients of a memory (d).
        window: tokens it spans (theta).
        num_inputs: signals; LMUFormer has one.
        hidden: width of the layer behind the memory; None means d_model.
    """

    context: ClassVar[str] = "carry"

    order: int = 32
    window: int = 128
    num_inputs: int = 1
    hidden: int | None = None

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "order", "window", "num_inputs", "hidden")

    def build(self, info: BuildInfo) -> "LMUMixer":
        return LMUMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        hidden, chunk = self.hidden or d_model, min(CHUNK, seq_len)
        memory = 2 * self.num_inputs * self.order * (chunk + self.order)
        return 2 * self.num_inputs * (d_model + self.order * hidden) + 4 * d_model * hidden + memory

    def state_size(self, d_model: int, seq_len: int) -> int:
        return self.order * self.num_inputs

    @classmethod
    def example(cls) -> tuple["LMU", BuildInfo]:
        return cls(order=6, window=12, num_inputs=2), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class LMUMixer(RecurrentMixer):
    def __init__(self, config: LMU, info: BuildInfo):
        self.config = config
        hidden = config.hidden or info.d_model
        stream, unit = (("embed", info.d_model),), (("ffn", hidden),)
        self.signal = Linear(stream, ((None, config.num_inputs),))
        self.recall = Linear(((None, config.order), (None, config.num_inputs)), unit)
        self.direct = Linear(stream, unit)
        self.output = Linear(unit, stream, init=fan_in(hidden, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        return empty_state(batch, dtype, memory=(self.config.order, self.config.num_inputs))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        u_BTG = save_point(jax.nn.relu(self.signal(x_BTD).astype(jnp.float32)), "recurrence_in")
        m_BTNG = save_point(self._memory(u_BTG, row), "recurrence_out").astype(x_BTD.dtype)
        return self.output(jax.nn.relu(self.recall(m_BTNG) + self.direct(x_BTD)))

    def _memory(self, u_BTG: jax.Array, row: Row) -> jax.Array:
        segment_ids, rules = row.ctx.segment_ids, row.ctx.rules
        tables = memory_tables(self.config.order, self.config.window)
        if isinstance(row, Continuation):
            m_BTNG, row.new["memory"] = legendre_memory(u_BTG, segment_ids, row.state["memory"], *tables)
            return m_BTNG
        size = rules.size("seq")

        def run(u_BTG: jax.Array, segment_ids: jax.Array) -> jax.Array:
            start = jnp.zeros((u_BTG.shape[0], self.config.order, u_BTG.shape[2]), jnp.float32)
            if size > 1:
                start = _entering(u_BTG, segment_ids, start, tables, rules.carry, size)
            return legendre_memory(u_BTG, segment_ids, start, *tables)[0]

        return local(run, rules, ((*TOKENS, None), TOKENS), (*TOKENS, None, None))(u_BTG, segment_ids)


def legendre_system(order: int, window: float) -> tuple[np.ndarray, np.ndarray]:
    """A (d, d) and B (d,) in float64: m_t = A m_{t-1} + B u_t holds u over one token."""
    n = np.arange(order)
    sign = np.where(n[:, None] < n, -1.0, (-1.0) ** (n[:, None] - n + 1))
    rate = (2 * n[:, None] + 1) / window
    A, B = rate * sign, (rate[:, 0] * (-1.0) ** n)
    held = scipy.linalg.expm(A)
    return held, np.linalg.solve(A, (held - np.eye(order)) @ B)


@functools.lru_cache(maxsize=16)
def memory_tables(order: int, window: float) -> tuple[np.ndarray, np.ndarray]:
    """A^l B (C, d) and A^(l+1) (C, d, d) for the lags l of a chunk, float32."""
    A, B = legendre_system(order, window)
    powers = [np.eye(order)]
    for _ in range(CHUNK):
        powers.append(A @ powers[-1])
    return (np.stack(powers[:-1]) @ B).astype(np.float32), np.stack(powers[1:]).astype(np.float32)


def legendre_memory(
    u_BTG: jax.Array, segment_ids: jax.Array, start_BNG: jax.Array, response_CN: np.ndarray, power_CNM: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """m_t = A m_{t-1} + B u_t from `start`, and from zero in every document that token 0 is not of.

    Returns m (B, T, d, G), unspecified at padding, and the memory after the last token that is none.
    """
    B, T, G = u_BTG.shape
    chunk = min(len(response_CN), T)
    count = -(-T // chunk)
    lag_CS = np.subtract.outer(np.arange(chunk), np.arange(chunk))
    response_CSN, power_CNM = response_CN[np.maximum(lag_CS, 0)], power_CNM[:chunk]

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, count * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, count, chunk, *x.shape[2:]), 1, 0)

    def one(m_BNG: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        u_BCG, real_BC, opens_BC = part
        # Documents are runs, so those of one document in a chunk are as far apart as their places.
        document_BC = jnp.cumsum(opens_BC, axis=1)
        seen_BCS = (lag_CS >= 0) & real_BC[:, None] & (document_BC[:, :, None] == document_BC[:, None])
        u_BCSG = jnp.where(seen_BCS[..., None], u_BCG[:, None], 0.0)
        kept_BCNG = jnp.where((document_BC == 0)[..., None, None], _dot("cnm,bmg->bcng", power_CNM, m_BNG), 0.0)
        m_BCNG = kept_BCNG + _dot("csn,bcsg->bcng", response_CSN, u_BCSG)
        last_B = jnp.max(jnp.where(real_BC, jnp.arange(chunk), -1), axis=1)
        end_BNG = jnp.take_along_axis(m_BCNG, jnp.maximum(last_B, 0)[:, None, None, None], axis=1)[:, 0]
        return jnp.where((last_B < 0)[:, None, None], m_BNG, end_BNG), m_BCNG

    last, m = jax.lax.scan(one, start_BNG, (cut(u_BTG), cut(segment_ids != 0), cut(starts(segment_ids))))
    return jnp.moveaxis(m, 0, 1).reshape(B, count * chunk, -1, G)[:, :T], last


def _dot(dims: str, left: np.ndarray, right: jax.Array) -> jax.Array:
    return jnp.einsum(dims, left, right, precision=jax.lax.Precision.HIGHEST)


def _entering(u_BTG, segment_ids, empty_BNG, tables, how: str, size: int) -> jax.Array:
    """The memory in front of this sequence shard: what the system makes of the identity is the shard's transition."""
    B, order, G = empty_BNG.shape
    eye = jnp.broadcast_to(jnp.eye(order, dtype=jnp.float32), (B, order, order))
    silent = jnp.concatenate([u_BTG, jnp.zeros((*u_BTG.shape[:2], order), u_BTG.dtype)], axis=-1)
    both = legendre_memory(silent, segment_ids, jnp.concatenate([empty_BNG, eye], axis=-1), *tables)[1]
    whole = sequence.one_document(segment_ids)[:, None, None]
    # One head: the algebra is that of matrix states.
    state, transition = both[:, None, :, :G], jnp.where(whole, both[..., G:], 0.0)[:, None]
    zero = (jnp.zeros_like(transition), jnp.zeros_like(state))
    passes_B = sequence.goes_on(segment_ids, size)
    return carry.incoming(transition, state, zero, passes_B, carry.MATRIX, how, size)[:, 0]
