"""The walk over a traced program: products, bytes held, what crosses devices, on programs that can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from mlt.plan import splits
from mlt.plan.program import Program

SIZES = {"fsdp": 4, "tensor": 2}
MESH = AbstractMesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
N = 256
MATRIX = 4 * N * N


def walk(fn, *inputs, parameters=None, **options):
    """(bytes held, tally) of a function of float32 arrays, each a shape and a split."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in inputs]
    program = Program(SIZES, parameters or {}, **options)
    held = program.run(jax.make_jaxpr(fn)(*shapes), [split for _, split in inputs])
    return held, program.tally


def whole(*shape):
    return shape, splits.whole(len(shape))


def test_products_are_counted_and_held_until_their_last_use():
    def three(x, w):
        y = x @ w
        return y @ w + 1.0, y @ (w * 2)

    held, tally = walk(three, whole(N, N), whole(N, N))
    assert tally.flops == 3 * 2 * N**3
    assert held.nbytes == 4 * MATRIX  # y, w * 2, and both results


def test_elementwise_chains_hold_nothing_until_they_are_read():
    held, tally = walk(lambda x, w: jnp.tanh(x * 2 + 1) @ w, whole(N, N), whole(N, N))
    assert held.nbytes == 2 * MATRIX  # what the product reads, and its result
    assert tally.moved == 2 * MATRIX + 3 * MATRIX  # x read and the chain's end written; two operands read, one result written


def test_a_chain_keeps_its_source_alive():
    def late(x, w):
        y = x @ w
        mask = y > 0  # used behind the next two products only
        z = (x + 1) @ w
        return jnp.where(mask, z @ w, 0.0)

    held, _ = walk(late, whole(N, N), whole(N, N))
    assert held.nbytes == 3 * MATRIX  # y for the mask, and at most two of x + 1, z and z @ w


def test_a_loop_holds_its_body_once_and_works_as_often_as_it_runs():
    def loop(x, w):
        def body(carry, w):
            return jnp.tanh(carry @ w), carry

        return jax.lax.scan(body, x, w)

    held, tally = walk(loop, whole(N, N), whole(5, N, N))
    assert tally.flops == 5 * 2 * N**3
    # The carry's room, five carries stacked; inside, the slice of w and the product.
    assert held.nbytes == (1 + 5 + 2) * MATRIX
    assert {depth for depth, _ in held.stores} == {0, 1}


def test_loops_in_loops_work_as_often_as_both_run_and_so_does_what_stands_behind_them():
    def loops(x, w):
        inner = lambda x, _: (jnp.tanh(x @ w), None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, length=5)[0] @ w

    split = (("fsdp",), ())
    _, tally = walk(loops, ((4 * N, N), split), ((N, N), split))
    assert tally.flops == (3 * 5 + 1) * 2 * N**3
    assert tally.crossings[("all-gather", ("fsdp",))] == (3 * 5 + 1) * 3 / 4 * MATRIX


def test_recomputation_counts_as_products_and_not_as_memory():
    def loss(remat):
        def layer(x, w):
            return jnp.tanh(jnp.tanh(x @ w) @ w)

        layer = jax.checkpoint(layer) if remat else layer
        return jax.grad(lambda x, w: jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0].sum(), argnums=1)

    (kept, plain), (less, again) = (walk(loss(remat), whole(N, N), whole(8, N, N)) for remat in (False, True))
    assert plain.flops == 8 * 6 * 2 * N**3
    assert again.flops >= 8 * 7 * 2 * N**3
    assert less.nbytes < 0.8 * kept.nbytes


@pytest.mark.parametrize(("kind", "share"), [("psum", 2 * 3 / 4), ("all_gather", 4 * 3 / 4), ("ppermute", 1.0)])
def test_collectives_inside_shard_map_are_counted_as_what_a_device_receives(kind, share):
    def local(x):
        ring = [(i, (i + 1) % 4) for i in range(4)]
        calls = {
            "psum": lambda: jax.lax.psum(x, "fsdp"),
            "all_gather": lambda: jax.lax.all_gather(x, "fsdp", tiled=True),
            "ppermute": lambda: jax.lax.ppermute(x, "fsdp", ring),
        }
        return calls[kind]()

    out = P("fsdp") if kind == "ppermute" else P()
    fn = jax.shard_map(local, mesh=MESH, in_specs=P("fsdp"), out_specs=out, check_vma=False)
    _, tally = walk(fn, ((4 * N, N), (("fsdp",), ())))
    ((_, axes), nbytes), *more = tally.crossings.items()
    assert (axes, nbytes, more) == (("fsdp",), share * MATRIX, [])


def test_a_row_parallel_product_is_summed_once_behind_the_residual_of_two():
    """(x w1 + x w2) with w split along the sum: one all-reduce of the sum, in the narrow type."""
    fn = lambda x, a, b: ((x @ a + x @ b).astype(jnp.float32) * 2.0) @ jnp.ones((N, N))  # noqa: E731
    split = ((), ("tensor",))
    _, tally = walk(fn, ((N, N), split), ((N, N), (("tensor",), ())), ((N, N), (("tensor",), ())))
    assert dict(tally.crossings) == {("all-reduce", ("tensor",)): 2 * (1 / 2) * MATRIX}


def test_a_gradient_is_scattered_as_its_parameter_lies_and_gathered_weights_once():
    def step(x, w):
        loss = lambda w: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))  # noqa: E731
        return w - jax.grad(loss)(w)

    split = (("fsdp",), ())
    _, tally = walk(step, ((4 * N, N), split), ((N, N), split), parameters={(N, N): split})
    assert tally.crossings[("all-gather", ("fsdp",))] == 3 / 4 * MATRIX
    assert tally.crossings[("reduce-scatter", ("fsdp",))] == 2 * 3 / 4 * MATRIX
    assert tally.crossings[("all-reduce", ("fsdp",))] == 0


def test_the_branch_with_the_most_products_counts():
    fn = lambda i, x: jax.lax.cond(i > 0, lambda x: x @ x, lambda x: x @ x @ x, x)  # noqa: E731
    _, tally = walk(fn, whole(), whole(N, N))
    assert tally.flops == 2 * 2 * N**3


def test_loops_of_unknown_length_say_so():
    fn = lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x @ x, x)  # noqa: E731
    _, tally = walk(fn, whole(N, N))
    assert tally.unknown_loops == 1
