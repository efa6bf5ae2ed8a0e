"""Linear maps of bfloat16 streams: the parameters' gradients are sums of float32, over tokens and over devices.

A sum of so many float32 values is good to 1e-5, give or take its order; a bfloat16 is good to 4e-3.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mlt.nn.linear import Linear
from mlt.nn.param import initialize
from mlt.parallel.mesh import Layout

IN, OUT = (("heads", 2), ("head_dim", 3)), (("embed", 5), (None, 2))


def drawn(rng, *shape: int) -> np.ndarray:
    """Values of one sign that bfloat16 has, so that sums grow far beyond their addends."""
    return np.asarray(jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.bfloat16).astype(jnp.float32))


def gradients(layer: Linear, x: jax.Array, weights: jax.Array):
    """Of the sum of the weighed outputs; the weights are their cotangents."""
    loss = lambda layer, x: jnp.sum(layer(x).astype(jnp.float32) * weights)  # noqa: E731
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(layer, x)


@pytest.mark.parametrize("devices", [1, 8])
def test_gradients_of_parameters_are_summed_in_float32(devices):
    rng = np.random.default_rng(0)
    layer = initialize(Linear(IN, OUT, bias=True), 0)
    x, weights = drawn(rng, 64, 128, 2, 3), drawn(rng, 64, 128, 5, 2)
    where = NamedSharding(Layout(replica=devices).build(jax.devices()[:devices]), PartitionSpec("replica"))
    given = jax.device_put(jnp.asarray(x, jnp.bfloat16), where), jax.device_put(weights, where)
    d_layer, d_x = gradients(layer, *given)
    kernel, rows = np.asarray(layer.kernel[...].astype(jnp.bfloat16), np.float64), (0, 1)
    np.testing.assert_allclose(d_layer.kernel[...], np.tensordot(x.astype(np.float64), weights, (rows, rows)), rtol=1e-4)
    np.testing.assert_allclose(d_layer.bias[...], weights.sum(rows, np.float64), rtol=1e-4)
    assert (d_x.dtype, d_layer.kernel[...].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.asarray(d_x, np.float64), np.tensordot(weights, kernel, ((2, 3), (2, 3))), atol=2**-6)


def test_a_layer_in_the_type_of_its_parameters_is_a_plain_product():
    rng = np.random.default_rng(0)
    layer = initialize(Linear(IN, OUT, bias=True), 0)
    x, weights = jnp.asarray(drawn(rng, 4, 7, 2, 3)), jnp.asarray(drawn(rng, 4, 7, 5, 2))
    d_layer, d_x = gradients(layer, x, weights)
    loss = lambda kernel, bias, x: jnp.sum((jnp.tensordot(x, kernel, 2) + bias) * weights)  # noqa: E731
    d_kernel, d_bias, want_x = jax.grad(loss, argnums=(0, 1, 2))(layer.kernel[...], layer.bias[...], x)
    for found, want in ((d_layer.kernel[...], d_kernel), (d_layer.bias[...], d_bias), (d_x, want_x)):
        np.testing.assert_allclose(found, want, rtol=1e-5)
