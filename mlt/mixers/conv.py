"""Short depthwise causal convolution, the token mixer in front of most recurrences."""

from typing import Any

import jax
import jax.numpy as jnp
import mlt_kernels
from flax import nnx

from mlt.mixers.base import Context
from mlt.nn.param import Init, param, uniform, zeros
from mlt.parallel import ops


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
        # The residual stream is whole on every device, whatever the layout of a parameter along it.
        self.axis = "stream" if names[0] == "embed" else names[0]
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

    def __call__(self, x: jax.Array, ctx: Context, *, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """x (B, T, *channels) convolved over the sequence; `segment_ids_BT` in place of the call's own."""
        segments = ctx.segment_ids if segment_ids_BT is None else segment_ids_BT
        flat, kernel, bias = self._flat(x)
        out = ops.causal_conv(ctx.rules, flat, kernel, bias=bias, segment_ids=segments, channels=self.axis, **self._options())
        return out.reshape(x.shape)

    def step(self, x: jax.Array, segment_ids_BT: jax.Array, halo: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Continue from `halo`; returns (y, halo for the next call)."""
        flat, *weights = self._flat(x)
        kernel, bias = (None if given is None else given.astype(x.dtype) for given in weights)
        before = halo.reshape(*halo.shape[:2], flat.shape[-1])
        out, after = mlt_kernels.causal_conv(
            flat, kernel, bias=bias, segment_ids=segment_ids_BT, halo=before, return_halo=True, **self._options()
        )
        return out.reshape(x.shape), after.reshape(halo.shape)

    def _flat(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        kernel = self.kernel[...].reshape(self.width, -1)
        bias = None if self.bias is None else self.bias[...].reshape(-1)
        return x.reshape(*x.shape[:2], -1), kernel, bias

    def _options(self) -> dict[str, Any]:
        return {"activation": self.activation, "dilation": self.dilation, "implementation": self.backend}
