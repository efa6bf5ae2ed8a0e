"""Expressive leaky memory (ELM, arXiv 2306.16922): a neuron with many time constants and one small network, as a layer."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from mlt_kernels import segments

from mlt.config.problems import Problem
from mlt.errors import UserError
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_positive
from mlt.nn.linear import Linear
from mlt.nn.param import constant, fan_in, given, param, zeros

UNROLL = 4
"""Tokens a loop iteration: fewer loop overheads against a longer program."""


class ELM(SequenceMixerConfig):
    """Branches b sum the fading traces of their synapses, which are channels of the stream; memories m fade at many rates:

        b_t = kappa_s b_{t-1} + sum over the branch's channels of relu(w) x_t          kappa_s = exp(-1 / synapse_timescale)
        d_t = 1.7159 tanh(2/3 (W_2 relu(W_1 [b_t; kappa m_{t-1}] + b_1) + b_2))        kappa = exp(-1 / tau)
        m_t = kappa m_{t-1} + c d_t;    y_t = W_o m_t

    c = gain (1 - kappa), or 1 - exp(-gain / tau) in the second version. All synapses fade alike, so that the trace of a
    branch is the sum of theirs. The tau are spaced evenly in logarithm between `timescales`; with `learn_timescales` they
    are low + (high - low) sigmoid(p). The paper's synapses take inputs of its tasks; here they take the normed stream, of
    which each channel has one. The recurrence of m is nonlinear: one token after another, with mesh.context = 1 only.

    Attributes:
        memories: leaky memories (M).
        branches: a divisor of d_model.
        hidden: hidden units of the network; None means 2 * memories.
        synapse_timescale: tokens after which a trace has faded to 1/e.
        timescales: lowest and highest tau, in tokens.
        gain: lambda of the paper.
        version: 1 or 2, what c is.
        learn_timescales: whether the tau are trained.
    """

    context: ClassVar[str] = "none"

    memories: int
    branches: int
    hidden: int | None = None
    synapse_timescale: float = 5.0
    timescales: tuple[float, float] = (1.0, 1000.0)
    gain: float = 5.0
    version: Literal[1, 2] = 1
    learn_timescales: bool = False

    @property
    def units(self) -> int:
        return self.hidden or 2 * self.memories

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "memories", "branches", "hidden")
        if not 0 < self.timescales[0] < self.timescales[1]:
            yield Problem("timescales", self.timescales, "must be a lower and a higher positive number")
        for name in ("synapse_timescale", "gain"):
            if getattr(self, name) <= 0:
                yield Problem(name, getattr(self, name), "must be positive")
        if self.kernel is not None:
            yield Problem("kernel", self.kernel, "must be None: there is one implementation")

    def build(self, info: BuildInfo) -> "ELMMixer":
        return ELMMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        network = 2 * self.units * (self.branches + 2 * self.memories)
        return network + 2 * d_model * (1 + self.memories) + 2 * self.branches + 8 * self.memories

    def state_size(self, d_model: int, seq_len: int) -> int:
        return self.branches + self.memories

    @classmethod
    def example(cls) -> tuple["ELM", BuildInfo]:
        config = cls(memories=6, branches=8, timescales=(1.0, 20.0), learn_timescales=True)
        return config, BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class ELMMixer(RecurrentMixer):
    def __init__(self, config: ELM, info: BuildInfo):
        d, m, b, f = info.d_model, config.memories, config.branches, config.units
        if d % b:
            raise UserError(f"ELM: branches = {b} must divide d_model = {d}; change either")
        self.config = config
        tau = np.geomspace(*config.timescales, m)
        self.synapse = param((b, d // b), (None, None), constant(0.5), group="vector")
        low, high = config.timescales
        share = np.clip((tau - low) / (high - low), 1e-3, 1 - 1e-3)
        start = given(np.log(share / (1 - share)), "logit of timescales")
        self.timescale = param((m,), (None,), start) if config.learn_timescales else None
        self.branch_in = Linear(((None, b),), ((None, f),), bias=True)
        self.memory_in = param((m, f), (None, None), fan_in(m))
        self.network_out = param((f, m), (None, None), fan_in(f))
        self.network_bias = param((m,), (None,), zeros)
        self.output = Linear(((None, m),), (("embed", d),), init=fan_in(m, scale=info.residual_scale))

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        return empty_state(batch, dtype, trace=(self.config.branches,), m=(self.config.memories,))

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        config = self.config
        synapses = x_BTD.astype(jnp.float32).reshape(*x_BTD.shape[:2], config.branches, -1)
        input_BTS = jnp.sum(jax.nn.relu(self.synapse[...]) * synapses, axis=-1)
        keep_BTS = jnp.full_like(input_BTS, np.exp(-1 / config.synapse_timescale))
        trace_BTS = row.diagonal_recurrence(keep_BTS, input_BTS, name="trace")
        pre_BT1F = save_point(self.branch_in(trace_BTS), "recurrence_in")[:, :, None]
        weights = (self.memory_in[...], self.network_out[...], self.network_bias[...], *self._rates())
        whole = tuple((None,) * w.ndim for w in weights)
        m_BT1M = row.token_scan(scan, ("m",), (pre_BT1F, *weights), (("batch", "seq", None, None), *whole))
        return self.output(save_point(m_BT1M[:, :, 0], "recurrence_out").astype(x_BTD.dtype))

    def _rates(self) -> tuple[jax.Array, jax.Array]:
        """What a memory keeps, and what it takes."""
        config, (low, high) = self.config, self.config.timescales
        tau_M = jnp.asarray(np.geomspace(low, high, config.memories), jnp.float32)
        if self.timescale is not None:
            tau_M = low + (high - low) * jax.nn.sigmoid(self.timescale[...])
        forgotten_M = -jnp.expm1(-1 / tau_M)
        return jnp.exp(-1 / tau_M), config.gain * forgotten_M if config.version == 1 else -jnp.expm1(-config.gain / tau_M)


def scan(
    state: dict[str, jax.Array] | None,
    segment_ids_BT: jax.Array,
    pre_BT1F: jax.Array,
    memory_in_MF: jax.Array,
    out_FM: jax.Array,
    bias_M: jax.Array,
    keep_M: jax.Array,
    take_M: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The token loop. `pre` is the network's hidden input without its memories; (m (B, T, 1, M), last state)."""
    empty_BM = jnp.zeros((pre_BT1F.shape[0], keep_M.shape[0]), jnp.float32)

    def token(m_BM, xs):
        pre_BF, start_B, real_B = xs
        faded_BM = keep_M * jnp.where(start_B[:, None], 0.0, m_BM)
        hidden_BF = jax.nn.relu(pre_BF + faded_BM @ memory_in_MF)
        new_BM = faded_BM + take_M * 1.7159 * jnp.tanh(2 / 3 * (hidden_BF @ out_FM + bias_M))
        return jnp.where(real_B[:, None], new_BM, m_BM), jnp.where(real_B[:, None], new_BM, 0.0)

    xs = (pre_BT1F[:, :, 0], segments.starts(segment_ids_BT), segment_ids_BT != 0)
    with jax.default_matmul_precision("highest"):
        xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs)
        last_BM, m_TBM = jax.lax.scan(token, empty_BM if state is None else state["m"], xs, unroll=UNROLL)
    return jnp.moveaxis(m_TBM, 0, 1)[:, :, None], {"m": last_BM}
