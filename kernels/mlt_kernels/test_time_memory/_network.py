"""The memory's network, its losses, the links from accumulators to weights, and what a chunk's step goes through.

Shapes are those of one or more heads with any leading dims: a matrix (..., a, b), tokens (..., K).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from mlt_kernels.test_time_memory._products import HIGHEST, Product
from mlt_kernels.test_time_memory._spec import MemorySpec

NORM_EPS = 1e-6
SMOOTH = 1e-6
LINK_FLOOR = 1e-3
ROW_EPS = 1e-5
ORTHOGONAL_EPS = 1e-7

Map = Callable[[Array], Array]


def forward(spec: MemorySpec, maps: Sequence[Map], x: Array, norm: tuple[Array, Array] | None) -> Array:
    """y of the network at x, where `maps[l]` applies its matrix l (bias row included)."""
    act = jax.nn.silu if spec.activation == "silu" else jax.nn.gelu

    def apply(level: int, u: Array) -> Array:
        if spec.bias:
            u = jnp.concatenate([u, jnp.ones_like(u[..., :1])], axis=-1)
        return maps[level](u)

    if spec.net == "gated":
        z = apply(2, act(apply(0, x)) * apply(1, x))
    else:
        z = apply(0, x)
        for level in range(1, len(maps)):
            z = apply(level, act(z))
    if norm is not None:
        centred = z - jnp.mean(z, axis=-1, keepdims=True)
        scale, bias = norm
        z = scale * centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + NORM_EPS) + bias
    return z + x if spec.residual else z


def loss(spec: MemorySpec, y: Array, v: Array, threshold: Array | None) -> Array:
    """The objective of each token, (...,) for y and v (..., V)."""
    if spec.loss == "dot":
        return -jnp.sum(y * v, axis=-1)
    r = y - v
    if spec.loss == "l2":
        return 0.5 * spec.loss_scale * jnp.sum(r * r, axis=-1)
    if spec.loss == "lp":
        return jnp.sum((r * r + SMOOTH) ** (spec.power / 2), axis=-1)
    assert threshold is not None
    if spec.loss == "huber_coord":
        size = jnp.abs(r)
        d = threshold[..., None]
        return jnp.sum(jnp.where(size <= d, 0.5 * r * r, d * size - 0.5 * d * d), axis=-1)
    square = jnp.sum(r * r, axis=-1)
    inside = square <= threshold * threshold
    if spec.loss == "huber_norm":
        beyond = threshold * jnp.sqrt(jnp.where(inside, 1.0, square)) - 0.5 * threshold * threshold
    else:
        beyond = threshold * jnp.sum(jnp.sqrt(r * r + SMOOTH), axis=-1)
    return jnp.where(inside, 0.5 * square, beyond)


def power_norm(a: Array, q: float) -> Array:
    """(..., 1, 1): |a|_q over a matrix, taken out of its largest entry; 0 has a zero gradient."""
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True))
    size = jnp.where(size > 0, size, 1.0)
    total = jnp.sum(jnp.abs(a / size) ** q, axis=(-2, -1), keepdims=True)
    return size * jnp.where(total > 0, jnp.where(total > 0, total, 1.0) ** (1 / q), 0.0)


def link_scale(spec: MemorySpec, a: Array) -> Array | None:
    """(..., 1, 1): what a link multiplies the accumulator by; None where it does not only scale."""
    q = spec.link_power
    if spec.link == "pnorm":
        return jnp.maximum(power_norm(a, q), LINK_FLOOR) ** (2 - q)
    if spec.link == "norm_cap":
        return 1 / jnp.maximum(1.0, power_norm(a, q) / spec.link_cap)
    return None


def expose(spec: MemorySpec, a: Array) -> Array:
    """The weights that an accumulator stands for."""
    scale = link_scale(spec, a)
    if scale is not None:
        return a * scale
    if spec.link == "softmax":
        return jax.nn.softmax(a, axis=-1)
    if spec.link == "mirror":
        q = spec.link_power
        return jnp.sign(a) * jnp.abs(a) ** (q - 1) * jnp.maximum(power_norm(a, q), LINK_FLOOR) ** (2 - q)
    return a


def accumulator(spec: MemorySpec, w: Array) -> Array:
    """The accumulator of an initial matrix: the one that exposes it under "pnorm", the matrix itself otherwise."""
    if spec.link != "pnorm":
        return w
    q = spec.link_power
    return w * jnp.maximum(power_norm(w, q), LINK_FLOOR) ** ((q - 2) / (3 - q))


def exact(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def orthogonalize(spec: MemorySpec, g: Array, product: Product = exact) -> Array:
    """Newton-Schulz: the singular values of g, divided by its Frobenius norm, towards 1."""
    if not spec.newton_schulz:
        return g
    tall = g.shape[-2] > g.shape[-1]
    x = jnp.swapaxes(g, -2, -1) if tall else g
    square = jnp.sum(x * x, axis=(-2, -1), keepdims=True)
    size = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    x = x / (size + ORTHOGONAL_EPS)

    def iterate(x: Array, coefficients: Array) -> tuple[Array, None]:
        a, b, c = coefficients
        gram = product(x, jnp.swapaxes(x, -2, -1))
        return a * x + product(b * gram + c * product(gram, gram), x), None

    x, _ = jax.lax.scan(iterate, x, jnp.asarray(spec.newton_schulz, x.dtype))
    return jnp.swapaxes(x, -2, -1) if tall else x


def unit_norms(w: Array) -> Array:
    """(..., 1, b): the norm of what feeds each unit."""
    square = jnp.sum(w * w, axis=-2, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def renormalize(spec: MemorySpec, w: Array, initial: Array) -> Array:
    """`w` with what feeds each unit scaled to its norm in the initial memory."""
    return w / (unit_norms(w) + ROW_EPS) * unit_norms(initial) if spec.row_norm else w
