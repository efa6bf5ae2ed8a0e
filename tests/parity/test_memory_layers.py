"""Product-key memory, Memory+ and PEER against the released code of arXiv 2412.09764 (`tools/memory_goldens.py`)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels.testing import assert_close

from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.channel.peer import PEER
from mlt.mixers.channel.product_key_memory import ProductKeyMemory
from mlt.nn.param import initialize
from mlt.parallel.rules import Rules

GOLDEN = pathlib.Path(__file__).parent / "golden" / "memory_layers.npz"
HEADS, N, K, D = 3, 7, 12, 24
COMMON = {"num_keys": N, "num_selected": 5, "num_heads": HEADS, "key_dim": K, "query_norm": False, "bias": True}
VARIANTS = {
    "plain": ProductKeyMemory(**COMMON, value_dim=10, gated=False),
    "memory_plus": ProductKeyMemory(**COMMON),
    "peer": PEER(**COMMON),
}
OURS = {
    "keys": "keys",
    "query.kernel": "query_proj.query_mlps.0.weight",
    "query.bias": "query_proj.query_mlps.0.bias",
    "values": "values.weight",
    "gate.kernel": "swilu_projection.weight",
    "gate.bias": "swilu_projection.bias",
    "output.kernel": "value_proj.weight",
    "output.bias": "value_proj.bias",
    "up": "values_u.weight",
    "down": "values_v.weight",
}


def ours(name: str, theirs: np.ndarray) -> np.ndarray:
    """One of their arrays in our layout."""
    if name == "keys":
        return theirs.reshape(HEADS, 2, N, K // 2).swapaxes(0, 1)
    if name == "query.kernel":
        return theirs.T.reshape(D, HEADS, K)
    if name == "query.bias":
        return theirs.reshape(HEADS, K)
    return theirs.T if name.endswith(".kernel") else theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_released_layer_is_reproduced(variant):
    with np.load(GOLDEN) as file:
        golden = {key.removeprefix(f"{variant}/"): file[key] for key in file.files if key.startswith(f"{variant}/")}
    mixer = initialize(VARIANTS[variant].build(BuildInfo(d_model=D, num_sub_layers=4, vocab_size=64)), 0)
    used = set()

    def leaf_of(kind: str, path) -> np.ndarray:
        name = ".".join(key.name for key in path if getattr(key, "name", "value") != "value")
        used.add(OURS[name])
        return ours(name, golden[f"{kind}/{OURS[name]}"])

    mixer = jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(leaf_of("weights", path)), mixer)
    assert used == {key.removeprefix("weights/") for key in golden if key.startswith("weights/")}
    ids = jnp.ones(golden["x"].shape[:2], jnp.int32)
    ctx = Context(ids, ids, ids, Rules(), True)

    @jax.jit
    def run(mixer, x):
        def total(mixer, x):
            y = mixer(x, ctx)[0]
            return (y**2).sum(), y

        return jax.value_and_grad(total, (0, 1), has_aux=True)(mixer, x)

    (_, y), (d_mixer, dx) = run(mixer, jnp.asarray(golden["x"]))
    assert_close(y, golden["y"], max_rel=1e-5)
    assert_close(dx, golden["dx"], max_rel=1e-5)
    for path, gradient in jax.tree.leaves_with_path(d_mixer):
        assert_close(gradient, leaf_of("gradients", path), max_rel=1e-5, what=jax.tree_util.keystr(path))
