"""A scan over chunks of tokens that reads its inputs and writes its results where they are.

`jax.lax.scan` wants the chunks as first dim: copies of every input, of the result and of all gradients, three quarters
of their own memory. Here each step slices what it needs and puts what it made in place.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Body = Callable[[Any, Any, Any], tuple[Any, Array]]
"""(carry, chunk of the inputs, chunk of the fixed ones) -> (carry, chunk of the result)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def scan_chunks(body: Body, length: int, return_carries: bool, carry: Any, inputs: Any, fixed: Any) -> tuple[Any, Array, Any]:
    """Runs `body` over chunks of `length` tokens. What it keeps for the backward pass are the carries that entered.

    Args:
      body: closes over no array.
      inputs, fixed: arrays (B, T, ...) whose T `length` divides. The fixed ones, masks and places, have no gradient.

    Returns:
      the last carry, the result (B, T, ...) and, with `return_carries`, those that entered, (T / length, ...), else None.
    """
    return _run(body, length, return_carries, carry, inputs, fixed)


def _run(body: Body, length: int, stack: bool, carry: Any, inputs: Any, fixed: Any) -> tuple[Any, Array, Any]:
    B, T = jax.tree.leaves(inputs)[0].shape[:2]
    chunk = jax.eval_shape(lambda *args: body(*args)[1], carry, _at(inputs, 0, length), _at(fixed, 0, length))

    def step(loop: tuple[Any, Array], i: Array) -> tuple[tuple[Any, Array], Any]:
        entering, result = loop
        leaving, made = body(entering, _at(inputs, i, length), _at(fixed, i, length))
        return (leaving, _put(result, made, i)), entering if stack else None

    empty = jnp.zeros((B, T, *chunk.shape[2:]), chunk.dtype)
    (carry, result), carries = jax.lax.scan(step, (carry, empty), jnp.arange(T // length))
    return carry, result, carries


def _fwd(body: Body, length: int, return_carries: bool, carry: Any, inputs: Any, fixed: Any) -> tuple[Any, Any]:
    carry, result, carries = _run(body, length, True, carry, inputs, fixed)
    return (carry, result, carries if return_carries else None), (inputs, fixed, carries)


def _bwd(body: Body, length: int, return_carries: bool, saved: Any, grads: Any) -> tuple[Any, Any, None]:
    inputs, fixed, carries = saved
    grad_carry, grad_result, grad_carries = grads

    def step(loop: tuple[Any, Any], xs: tuple[Array, Any, Any]) -> tuple[tuple[Any, Any], None]:
        grad_leaving, grad_inputs = loop
        i, entering, grad_kept = xs
        _, pull = jax.vjp(lambda *args: body(*args, _at(fixed, i, length)), entering, _at(inputs, i, length))
        grad_entering, made = pull((grad_leaving, _at(grad_result, i, length)))
        if return_carries:
            grad_entering = jax.tree.map(jnp.add, grad_entering, grad_kept)
        return (grad_entering, jax.tree.map(lambda x, y: _put(x, y, i), grad_inputs, made)), None

    count = jax.tree.leaves(carries)[0].shape[0]
    start = (grad_carry, jax.tree.map(jnp.zeros_like, inputs))
    (grad_carry, grad_inputs), _ = jax.lax.scan(step, start, (jnp.arange(count), carries, grad_carries), reverse=True)
    return grad_carry, grad_inputs, None


scan_chunks.defvjp(_fwd, _bwd)


def _at(tree: Any, i: Array | int, length: int) -> Any:
    """Chunk i of every array (B, T, ...)."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * length, length, axis=1), tree)


def _put(whole: Array, chunk: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, chunk, i * chunk.shape[1], axis=1)
