"""Which tables of a model are read in 8 bits, and a model that holds them so, for those who train nothing."""

from typing import Any

import jax
import numpy as np

from mlt.model.edges import PARTS
from mlt.model.lm import LM, LMConfig
from mlt.nn.float8 import Rows8
from mlt.nn.param import path_name
from mlt.parallel.table import MOST_LOCAL_ROWS


def float8_names(config: LMConfig) -> set[str]:
    """Names in the model of the tables whose rows are read in 8 bits, and exported so."""
    return {
        f"stack.{part}.{i}.sub_layers.{j}.mixer.{name}"
        for part in PARTS
        for i, block in enumerate(getattr(config.stack, part))
        for j, mixer in enumerate(block.mixers)
        for name in mixer.float8_tables
    }


def held_in_8_bits(model: LM) -> LM:
    """The model with these tables held in 8 bits, a quarter of the memory and the same outputs; no gradient passes.

    A table with more rows than 32 bits address stays as it is.
    """
    names = float8_names(model.config)

    def held(path: Any, leaf: Any) -> Any:
        few = path_name(path) in names and leaf.shape[-2] <= MOST_LOCAL_ROWS
        return Rows8.of(np.asarray(leaf)) if few else leaf

    return jax.tree_util.tree_map_with_path(held, model)
