"""Gradients of parameters under a bfloat16 stream are sums over all tokens: no layer of any family leaves them to bfloat16.

From 256 on, one more does not change a sum of ones in bfloat16. Where a parameter is cast first and then added to the stream or
multiplied with it, that is the sum its gradient becomes, unless the compiler of a platform knows better. Products of
matrices are summed wider by every platform.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.config.load import load_config
from mlt.loss import token_losses
from mlt.nn.param import merge, partition
from mlt.parallel.rules import Rules
from mlt.train.setup import describe_model
from mlt.verify.material import clusters_of, packed_rows

FAMILIES = sorted((pathlib.Path(__file__).parents[2] / "configs" / "families").glob("*.py"))
ROWS, LENGTH = 2, 64


def sums(program):
    """(what is summed, result) of every sum in a program, those of loops, branches and calls included."""
    for equation in program.eqns:
        if equation.primitive.name == "reduce_sum":
            yield equation.invars[0].aval, equation.outvars[0].aval
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from sums(inner)


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_no_gradient_is_summed_over_tokens_in_16_bits(path):
    config = load_config(path)
    ids, specs = config.data.tokenizer.vocab_size, describe_model(config)
    clusters = clusters_of(config.model.stack)
    batch = packed_rows(np.random.default_rng(0), rows=ROWS, length=LENGTH, num_ids=ids, **clusters)
    trained, buffers = partition(jax.tree.map(lambda spec: spec.abstract(), specs))

    def loss(trained, buffers, batch):
        options = {"dtype": jnp.bfloat16, "remat": config.remat, "train": True}
        return jnp.sum(token_losses(merge(trained, buffers), batch, Rules(None), **options)[0])

    program = jax.make_jaxpr(jax.grad(loss))(trained, buffers, batch)
    found = list(sums(program.jaxpr))
    assert found
    narrow = {f"{a} to {b}" for a, b in found if a.dtype == jnp.bfloat16 and a.size >= ROWS * LENGTH * max(b.size, 1)}
    assert not narrow
