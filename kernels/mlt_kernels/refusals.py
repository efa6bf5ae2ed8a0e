"""What a library says of a call before it is made: the call and its gradients are traced for shapes alone."""

from collections.abc import Callable
from typing import Any

import jax


def refusal(
    fn: Callable[..., Any], arrays: tuple[Any, ...], *others: Any, errors: tuple[type[Exception], ...]
) -> Exception | None:
    """The error of one of these types that `fn(*arrays, *others)` or its gradients in `arrays` raise, or None."""
    like: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (arrays, others))

    def both(arrays: Any, others: Any) -> Any:
        out, pull = jax.vjp(lambda *x: fn(*x, *others), *arrays)
        return pull(out)

    try:
        jax.eval_shape(both, *like)
    except errors as error:
        return error
    return None


def first_line(error: Exception) -> str:
    """The first line of its message, or its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]
