"""What a library says of a call that is only traced."""

import jax
import jax.numpy as jnp
import pytest
from mlt_kernels.refusals import first_line, refusal

X = jnp.ones((2, 3))


@jax.custom_vjp
def without_gradient(x):
    return x


def refused_backwards(_, ct):
    raise NotImplementedError(f"no gradient of {ct.shape}\nat all")


without_gradient.defvjp(lambda x: (x, None), refused_backwards)


def test_what_can_be_traced_is_not_refused():
    assert refusal(lambda x, factor: factor * x, (X,), 2.0 * X, errors=(ValueError,)) is None


def test_an_error_of_the_gradient_counts_too():
    error = refusal(without_gradient, (X,), errors=(ValueError, NotImplementedError))
    assert isinstance(error, NotImplementedError)
    assert first_line(error) == "no gradient of (2, 3)"
    assert first_line(ValueError()) == "ValueError"


def test_other_errors_are_the_callers():
    with pytest.raises(NotImplementedError, match="no gradient"):
        refusal(without_gradient, (X,), errors=(ValueError,))
