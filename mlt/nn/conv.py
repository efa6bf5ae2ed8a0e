"""Short depthwise causal convolution, the token mixer in front of most recurrences."""

import jax
import jax.numpy as jnp
from flax import nnx
from mlt_kernels import causal_conv

from mlt.nn.param import Init, param, uniform, zeros


class CausalConv(nnx.Module):
    """y_t = activation(sum_w kernel[w] * x_{t - (W-1-w)*dilation}) inside one document, per channel.

    Args:
        axes: (logical axis, size) of each channel dim; x is (B, T, *channels).
        width: number of taps; the last one reads the current token.
        backend: implementation of the op; None takes the best available.
    """

    def __init__(
        self,
        axes: tuple[tuple[str | None, int], ...],
        *,
        width: int = 4,
        dilation: int = 1,
        activation: str | None = "silu",
        bias: bool = False,
        init: Init | None = None,
        backend: str | None = None,
    ):
        self.backend = backend
        names, sizes = zip(*axes, strict=True)
        self.channels, self.width, self.dilation, self.activation = sizes, width, dilation, activation
        init = init or uniform(-(width**-0.5), width**-0.5)
        self.kernel = param((width, *sizes), (None, *names), init, group="vector")
        self.bias = param(sizes, names, zeros, group="vector") if bias else None

    @property
    def context(self) -> int:
        """Tokens to the left that an output depends on."""
        return (self.width - 1) * self.dilation

    def init_state(self, batch: int, dtype: jnp.dtype) -> jax.Array:
        """The halo in front of the first token: zeros (B, context, *channels)."""
        return jnp.zeros((batch, self.context, *self.channels), dtype)

    def __call__(self, x: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        return self._run(x, segment_ids_BT, halo=None)

    def step(self, x: jax.Array, segment_ids_BT: jax.Array, halo: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Continue from `halo`; returns (y, halo for the next call)."""
        return self._run(x, segment_ids_BT, halo=halo)

    def _run(self, x, segment_ids_BT, *, halo):
        flat = x.reshape(*x.shape[:2], -1)
        out = causal_conv(
            flat,
            self.kernel[...].reshape(self.width, -1).astype(x.dtype),
            bias=None if self.bias is None else self.bias[...].reshape(-1).astype(x.dtype),
            activation=self.activation,
            dilation=self.dilation,
            segment_ids=segment_ids_BT,
            halo=None if halo is None else halo.reshape(*halo.shape[:2], -1),
            return_halo=halo is not None,
            implementation=self.backend,
        )
        if halo is None:
            return out.reshape(x.shape)
        return out[0].reshape(x.shape), out[1].reshape(halo.shape)
