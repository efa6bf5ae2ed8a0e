"""sLSTM, the scalar memory of xLSTM (arXiv 2405.04517): gates that read the last output, hence one token at a time."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from mlt_kernels import segments

from mlt.config.problems import Problem
from mlt.errors import UserError
from mlt.mixers.base import BuildInfo, SequenceMixerConfig, save_point
from mlt.mixers.conv import CausalConv
from mlt.mixers.recurrent import RecurrentMixer, Row, empty_state
from mlt.mixers.sizes import not_positive
from mlt.nn.head_norm import HeadNorm
from mlt.nn.param import Init, normal, param, zeros

EMPTY = -1e30
"""The running maximum before the first token: the first gate is then the maximum, whatever its value."""
UNROLL = 4
"""Tokens a loop iteration: fewer loop overheads against a longer program."""


class SLSTM(SequenceMixerConfig):
    """c_t = f c_{t-1} + i tanh(z),  n_t = f n_{t-1} + i,  h_t = sigmoid(o) c_t / n_t,  out = norm(h).

    i = exp of its pre-activation and f = sigmoid, with a running maximum taken out of both (the state is finite
    whatever the gates). All four pre-activations are x W + h_{t-1} R + b, block-diagonal over heads; i and f read a
    short convolution of x with SiLU, z and o read x itself. R starts at zero; b is zero but for the forget gate's, which
    falls from 5 to -7 over the channels of a head by a power that grows with `depth`. The norm is a layer norm of each
    head. As in the paper's block there is no output projection: a feed-forward mixer follows.

    The recurrence is nonlinear, so no state can be carried over shards of a sequence: it runs with mesh.context = 1 only,
    and one token after another.

    Attributes:
        num_heads: heads (H), a divisor of d_model: each is d_model / num_heads wide.
        conv_width: taps of the convolution in front of the gates i and f.
        depth: place in the stack, from 0 (first) to 1 (last); of the forget gate's init.
    """

    context: ClassVar[str] = "none"

    num_heads: int
    conv_width: int = 4
    depth: float = 0.0

    def problems(self) -> Iterator[Problem]:
        yield from not_positive(self, "num_heads", "conv_width")
        if not 0 <= self.depth <= 1:
            yield Problem("depth", self.depth, "must lie in [0, 1]")
        if self.kernel is not None:
            yield Problem("kernel", self.kernel, "must be None: there is one implementation")

    def build(self, info: BuildInfo) -> "SLSTMMixer":
        return SLSTMMixer(self, info)

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        return 16 * d_model * d_model / self.num_heads + (2 * self.conv_width + 20) * d_model

    def state_size(self, d_model: int, seq_len: int) -> int:
        return (4 + self.conv_width - 1) * d_model

    @classmethod
    def example(cls) -> tuple["SLSTM", BuildInfo]:
        return cls(num_heads=2), BuildInfo(d_model=32, num_sub_layers=4, vocab_size=64)


class SLSTMMixer(RecurrentMixer):
    def __init__(self, config: SLSTM, info: BuildInfo):
        if info.d_model % config.num_heads:
            raise UserError(f"SLSTM: num_heads = {config.num_heads} must divide d_model = {info.d_model}; change either")
        self.config = config
        h, c = config.num_heads, info.d_model // config.num_heads
        self.heads = (h, c)
        channels = (("heads", h), ("head_dim", c))
        small = normal((2 / (5 * c)) ** 0.5)
        self.conv = CausalConv(channels, width=config.conv_width)
        self.input_forget = param((h, c, 2, c), ("heads", "head_dim", None, None), small)
        self.cell_output = param((h, c, 2, c), ("heads", "head_dim", None, None), small)
        self.recurrent = param((h, c, 4, c), ("heads", "head_dim", None, None), zeros)
        self.bias = param((h, 4, c), ("heads", None, "head_dim"), _gate_biases(config.depth), group="vector")
        self.norm = HeadNorm(h, c)

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
        lowest = jnp.full((batch, *self.heads), EMPTY, jnp.float32)
        return empty_state(batch, dtype, {"conv": self.conv}, h=self.heads, c=self.heads, n=self.heads, m=lowest)

    def mix(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        x_BTHC = x_BTD.reshape(*x_BTD.shape[:2], *self.heads)
        smooth_BTHC = row.conv("conv", self.conv, x_BTHC)
        kernels = (kernel[...].astype(x_BTD.dtype) for kernel in (self.input_forget, self.cell_output))
        halves = [jnp.einsum("bthc,hcgd->bthgd", x, w) for x, w in zip((smooth_BTHC, x_BTHC), kernels, strict=True)]
        pre_BTHGC = jnp.concatenate(halves, axis=3).astype(jnp.float32) + self.bias[...]
        pre_BTHGC = save_point(pre_BTHGC, "recurrence_in")
        gates, kernel = ("batch", "seq", "heads", None, None), ("heads", None, None, None)
        h_BTHC = row.token_scan(scan, ("h", "c", "n", "m"), (pre_BTHGC, self.recurrent[...]), (gates, kernel))
        return self.norm(save_point(h_BTHC, "recurrence_out").astype(x_BTD.dtype)).reshape(x_BTD.shape)


def scan(
    state: dict[str, jax.Array] | None, segment_ids_BT: jax.Array, pre_BTHGC: jax.Array, recurrent_HCGC: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The token loop. `pre` holds the gates i, f, z, o without their recurrent part; (h (B, T, H, C), last state)."""
    batch, _, heads, _, channels = pre_BTHGC.shape
    zero_BHC = jnp.zeros((batch, heads, channels), jnp.float32)
    empty = {"h": zero_BHC, "c": zero_BHC, "n": zero_BHC, "m": jnp.full_like(zero_BHC, EMPTY)}

    def token(state, xs):
        pre_BHGC, start_B, real_B = xs
        pick = lambda where_B, new, old: jnp.where(where_B[:, None, None], new, old)  # noqa: E731
        h, c, n, m = (pick(start_B, empty[name], state[name]) for name in ("h", "c", "n", "m"))
        pre_BHGC = pre_BHGC + jnp.einsum("bhc,hcgd->bhgd", h, recurrent_HCGC)
        input_, forget, cell, output = (pre_BHGC[:, :, gate] for gate in range(4))
        kept = jax.nn.log_sigmoid(forget) + m
        # Any running maximum gives the same h.
        top = jax.lax.stop_gradient(jnp.maximum(kept, input_))
        write, keep = jnp.exp(input_ - top), jnp.exp(kept - top)
        c, n = keep * c + write * jnp.tanh(cell), keep * n + write
        h = jax.nn.sigmoid(output) * c / n
        new = {"h": h, "c": c, "n": n, "m": top}
        return {name: pick(real_B, new[name], state[name]) for name in new}, pick(real_B, h, 0.0)

    xs = (pre_BTHGC, segments.starts(segment_ids_BT), segment_ids_BT != 0)
    with jax.default_matmul_precision("highest"):
        last, h_TBHC = jax.lax.scan(token, state or empty, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs), unroll=UNROLL)
    return jnp.moveaxis(h_TBHC, 0, 1), last


def _gate_biases(depth: float) -> Init:
    """Zero, and for the forget gate 5 - 12 (j / (C - 1))^(0.3 + 1.3 depth) over the channels j of a head."""

    def fn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        values = np.zeros(shape, np.float32)
        channel = np.arange(shape[-1]) / max(shape[-1] - 1, 1)
        values[:, 1] = 5 - 12 * channel ** (0.3 + 1.3 * depth)
        return values

    return Init(f"slstm_gate_bias({depth:g})", fn)
