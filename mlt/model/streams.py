"""Several residual streams in place of one: hyper-connections (arXiv 2409.19606), and the manifold-constrained ones (2512.24880).

The stream X is (B, T, M, D). Before a sub-layer F it is read into one, behind it the result is written to all:

    u = sum over m of pre[m] X[m]
    X[i] <- sum over j of residual[i, j] X[j] + post[i] F(u)

`pre`, `post` and `residual` are made for each token from its streams, so nothing passes from token to token. They are computed
and applied in float32. The token's embedding stands in all streams at the start; `Collapse` makes one of them at the end.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlt.config.base import Config
from mlt.config.problems import Problem, walk
from mlt.mixers.base import MixerConfig
from mlt.model.edges import placed_mixers
from mlt.nn.norm import rms_normalize
from mlt.nn.param import Init, constant, fan_in, given, param, zeros

if TYPE_CHECKING:
    from mlt.model.stack import Stack

STREAMS = ("batch", "seq", None, "stream")
APART = -5.0
"""Logit of the residual mixture between two different streams at the start, where that of a stream with itself is 0."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Number of a sub-layer in the whole stack: `first + stride * i` in the i-th repeat of a period."""

    first: int = 0
    stride: int = 0

    def behind(self, count: int) -> "Place":
        return dataclasses.replace(self, first=self.first + count)


class HyperConnections(Config):
    """How many residual streams a stack has, and how its sub-layers read and write them.

    `manifold` (mHC) makes the coefficients of all M streams joined together, x = vec(X) / rms(vec(X)):

        pre = sigmoid(g_0 x P_0 + b_0)    post = 2 sigmoid(g_1 x P_1 + b_1)    residual = S(mat(g_2 x P_2) + b_2)

    with S the Sinkhorn-Knopp iteration: exp, then columns and rows divided by their sums in turn, so that mixing keeps the
    streams' mean and cannot grow them. `free` (hyper-connections) makes them stream by stream, x_m = X[m] / rms(X[m]):

        pre[m] = g_0 tanh(x_m w_0) + b_0[m]    post[m] = g_1 tanh(x_m w_1) + b_1[m]
        residual[i, m] = g_0 tanh(x_m w_2)[i] + b_2[i, m]

    Of `manifold` the paper says the equations, t = 20 and g = 0.01. Ours is the start: b_0 and b_1 read the mean of the streams
    and write 1 to each, b_2 is nearly the identity (the mappings that the paper puts in place of those it leaves out), and
    P_0, P_1, P_2 are drawn with a variance of one over their inputs. Equal streams then stay so but for what P, through g,
    tells apart, and the model starts as the one of a single stream. `free` starts as its paper does: w = 0, residual the
    identity, post 1, and pre the stream with the sub-layer's number modulo M.

    Attributes:
        streams: how many (M).
        kind: see above.
        iterations: of Sinkhorn-Knopp, each of the columns and then of the rows; read by `manifold` alone.
        gate: g at the start.
        norm_eps: of the normalization of x.
    """

    streams: int = 4
    kind: Literal["manifold", "free"] = "manifold"
    iterations: int = 20
    gate: float = 0.01
    norm_eps: float = 1e-6

    def problems(self) -> Iterator[Problem]:
        if self.streams < 2:
            yield Problem("streams", self.streams, "must be at least 2", "leave hyper_connections None for one stream")
        if self.iterations < 1:
            yield Problem("iterations", self.iterations, "must be at least 1")
        if self.norm_eps <= 0:
            yield Problem("norm_eps", self.norm_eps, "must be positive")

    @property
    def coefficients(self) -> int:
        """Numbers that one sub-layer makes of a token's streams."""
        return self.streams * (self.streams + 2)

    def build(self, d_model: int, place: Place) -> "Connection":
        return ManifoldConnection(self, d_model) if self.kind == "manifold" else FreeConnection(self, d_model, place)

    def collapse(self, d_model: int) -> "Collapse":
        return ManifoldCollapse(self, d_model) if self.kind == "manifold" else Collapse()

    def flops_per_token(self, d_model: int) -> float:
        """Forward FLOPs of making the coefficients of one sub-layer, reading and writing; a multiply-add is 2."""
        made = 2 * d_model * self.coefficients * (self.streams if self.kind == "manifold" else 1)
        return made + 2 * d_model * self.coefficients

    def collapse_flops(self, d_model: int) -> float:
        """Of making one stream at the end."""
        return 2 * d_model * self.streams * (self.streams + 1) if self.kind == "manifold" else d_model * self.streams


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Coefficients of one sub-layer, float32: pre and post (B, T, M), residual (B, T, M, M)."""

    pre_BTM: jax.Array
    post_BTM: jax.Array
    residual_BTMM: jax.Array

    def read(self, x_BTMD: jax.Array) -> jax.Array:
        """The sub-layer's input (B, T, D), in the type of the streams."""
        return weighted(self.pre_BTM, x_BTMD)

    def write(self, x_BTMD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        """The streams behind the sub-layer. Sums over streams are written out, so that all of it is one pass over them."""
        new = self.post_BTM[..., None] * y_BTD[..., None, :].astype(jnp.float32)
        for j in range(x_BTMD.shape[-2]):
            new = new + self.residual_BTMM[..., j, None] * x_BTMD[..., None, j, :].astype(jnp.float32)
        return new.astype(x_BTMD.dtype)


class Connection(nnx.Module):
    """What a sub-layer adds to read and write several streams."""

    def __call__(self, x_BTMD: jax.Array) -> Mixing:
        raise NotImplementedError


class ManifoldConnection(Connection):
    def __init__(self, config: HyperConnections, d_model: int):
        self.config, m = config, config.streams
        self.projection = param((m * d_model, config.coefficients), ("embed", None), fan_in(m * d_model))
        self.gates = param((3,), (None,), constant(config.gate))
        start = np.concatenate([np.full(m, _mean_logit(m)), np.zeros(m), APART * (1 - np.eye(m)).reshape(-1)])
        self.bias = param(start.shape, (None,), given(start.astype(np.float32), "mean, one, near identity"))

    def __call__(self, x_BTMD: jax.Array) -> Mixing:
        m = self.config.streams
        made = projected(x_BTMD, self.projection[...], self.config.norm_eps)
        gates = jnp.repeat(self.gates[...], np.array([m, m, m * m]), total_repeat_length=self.config.coefficients)
        pre, post, residual = jnp.split(gates * made + self.bias[...], [m, 2 * m], axis=-1)
        residual = residual.reshape(*residual.shape[:-1], m, m)
        return Mixing(jax.nn.sigmoid(pre), 2 * jax.nn.sigmoid(post), doubly_stochastic(residual, self.config.iterations))


class FreeConnection(Connection):
    def __init__(self, config: HyperConnections, d_model: int, place: Place):
        self.config, m = config, config.streams
        self.projection = param((d_model, m + 2), ("embed", None), zeros)
        self.gates = param((2,), (None,), constant(config.gate))
        self.pre = param((m,), (None,), one_stream(place))
        self.post = param((m,), (None,), constant(1.0))
        self.residual = param((m, m), (None, None), given(np.eye(m, dtype=np.float32), "identity"), group="vector")

    def __call__(self, x_BTMD: jax.Array) -> Mixing:
        x = rms_normalize(x_BTMD, eps=self.config.norm_eps)
        made_BTMK = jnp.tanh(jnp.dot(x, self.projection[...]))
        read, write = self.gates[...]
        residual = read * jnp.swapaxes(made_BTMK[..., 2:], -1, -2) + self.residual[...]
        return Mixing(read * made_BTMK[..., 0] + self.pre[...], write * made_BTMK[..., 1] + self.post[...], residual)


class Collapse(nnx.Module):
    """One stream of several behind the last layer: here their sum, as in 2409.19606."""

    def __call__(self, x_BTMD: jax.Array) -> jax.Array:
        return x_BTMD.astype(jnp.float32).sum(-2).astype(x_BTMD.dtype)


class ManifoldCollapse(Collapse):
    """Where 2512.24880 is silent, DeepSeek-V4's: a sum weighted by sigmoid(g x P + b), like that of reading. It starts as the
    mean."""

    def __init__(self, config: HyperConnections, d_model: int):
        self.config, m = config, config.streams
        self.projection = param((m * d_model, m), ("embed", None), fan_in(m * d_model))
        self.gate = param((1,), (None,), constant(config.gate))
        self.bias = param((m,), (None,), constant(_mean_logit(m)))

    def __call__(self, x_BTMD: jax.Array) -> jax.Array:
        made = projected(x_BTMD, self.projection[...], self.config.norm_eps)
        return weighted(jax.nn.sigmoid(self.gate[...] * made + self.bias[...]), x_BTMD)


def _mean_logit(streams: int) -> float:
    """sigmoid of it is 1 / streams."""
    return -math.log(max(streams - 1, 1))


def expanded(x_BTD: jax.Array, streams: int) -> jax.Array:
    """(B, T, M, D): the same in every stream."""
    return jnp.broadcast_to(x_BTD[..., None, :], (*x_BTD.shape[:-1], streams, x_BTD.shape[-1]))


def weighted(weights_BTM: jax.Array, x_BTMD: jax.Array) -> jax.Array:
    """Sum of the streams with a weight each, in the type of the streams."""
    terms = [weights_BTM[..., m, None] * x_BTMD[..., m, :].astype(jnp.float32) for m in range(x_BTMD.shape[-2])]
    return sum(terms[1:], terms[0]).astype(x_BTMD.dtype)


def projected(x_BTMD: jax.Array, projection: jax.Array, eps: float) -> jax.Array:
    """vec(X) / rms(vec(X)) times a matrix, (B, T, K) float32; divided last, as the paper's kernels do."""
    flat = x_BTMD.reshape(*x_BTMD.shape[:-2], -1).astype(jnp.float32)
    return jnp.dot(flat, projection) * jax.lax.rsqrt(jnp.mean(flat * flat, axis=-1, keepdims=True) + eps)


def doubly_stochastic(logits: jax.Array, iterations: int) -> jax.Array:
    """Sinkhorn-Knopp: exp(logits) (..., M, M) with columns and then rows divided by their sums, so often.

    Rows sum to 1 exactly, columns the more nearly the more iterations. The gradient is that of these iterations. Logarithms
    are divided, so that no sum can vanish.
    """

    def turn(logs: jax.Array, _: None) -> tuple[jax.Array, None]:
        for axis in (-2, -1):
            logs = logs - jax.nn.logsumexp(logs, axis=axis, keepdims=True)
        return logs, None

    return jnp.exp(jax.lax.scan(turn, logits, None, length=iterations)[0])


def one_stream(place: Place) -> Init:
    """1 for the stream that has the sub-layer's number modulo their count, 0 for the others."""

    def fn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        copies = rng.bit_generator.seed_seq.spawn_key  # of the repeat, as `ParamSpec.stacked` draws it
        number = place.first + place.stride * (copies[-1] if copies else 0)
        return np.eye(shape[0], dtype=np.float32)[number % shape[0]]

    return Init(f"one stream, {place.first} + {place.stride} i", fn)


def stream_flops(stack: "Stack", d_model: int) -> float:
    """Forward FLOPs per token of reading, mixing and writing streams in a whole stack; 0 for one stream."""
    config = stack.hyper_connections
    if config is None:
        return 0.0
    connected = sum(mixer.num_branches == 1 for mixer in stack.mixers())
    return connected * config.flops_per_token(d_model) + config.collapse_flops(d_model)


def branch_problems(stack: "Stack") -> Iterator[Problem]:
    """Mixers that read and write other streams than there are, with paths relative to the stack."""
    streams = 1 if stack.hyper_connections is None else stack.hyper_connections.streams
    for _, path, mixer in placed_mixers(stack):
        if mixer.num_branches not in (1, streams):
            rule = f"reads and writes each of its residual streams; the stack has {streams}"
            ways_out = "set stack.hyper_connections, or use 1" if streams == 1 else f"use {streams}, or 1"
            yield Problem(f"{path}.branches", mixer.num_branches, rule, ways_out)
        for where, inner in walk(mixer, path):
            if isinstance(inner, MixerConfig) and inner is not mixer and inner.num_branches != 1:
                rule = f"is inside {type(mixer).__name__}, which has one stream"
                yield Problem(f"{where}.branches", inner.num_branches, rule, "use 1, or put it into the block itself")
