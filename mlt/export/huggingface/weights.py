"""Model directories of transformers: config.json and safetensors, read into a model of ours and written from one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlt.errors import UserError
from mlt.export.huggingface.architecture import Architecture
from mlt.export.huggingface.links import Tensors, read_all, write_all
from mlt.export.huggingface.registry import architecture_of, read_config
from mlt.export.names import from_tensors, layer_names, to_tensors
from mlt.model.lm import LM, LMConfig
from mlt.nn.param import named_leaves

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Buffers that old checkpoints hold and that follow from the config.
_DERIVED = (".rotary_emb.inv_freq",)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not an object")
    return values


def read_tensors(directory: Path) -> Tensors:
    """Every tensor of a model directory, as float32.

    Raises:
        UserError: a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    names = [SINGLE]
    if (directory / INDEX).exists():
        names = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
    tensors: Tensors = {}
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing; weights are read from {SINGLE}, or from the files of {INDEX}")
        try:
            tensors |= {key: np.asarray(value, np.float32) for key, value in load_file(directory / name).items()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{directory / name} cannot be read: {error}") from error
    return {name: array for name, array in tensors.items() if not name.endswith(_DERIVED)}


def model_of(config: LMConfig, values: Mapping[str, Any], tensors: Tensors, specs: LM, where: str) -> LM:
    """A model of arrays from their tensors.

    Args:
        config: ours, as read from `values`.
        values: of their config.json.
        tensors: theirs, by name.
        specs: the described model.
        where: for messages.

    Raises:
        UserError: the tensors are not those of the config.
    """
    architecture = architecture_of(dict(values), where)
    if config.tie_embeddings:
        tensors = {name: array for name, array in tensors.items() if name != "lm_head.weight"}
    ours = read_all(architecture.links(config), architecture.respelled(tensors), _shapes(config, specs), where)
    return from_tensors(config, specs, ours)


def read_model(directory: Path) -> tuple[LMConfig, LM]:
    """(config, model of arrays) of a model directory.

    Raises:
        UserError: the architecture, a setting or a tensor is not known.
    """
    values = read_json(directory / "config.json")
    config = read_config(values, str(directory / "config.json"))
    return config, model_of(config, values, read_tensors(directory), config.build(), str(directory))


def write_model(config: LMConfig, model: LM, architecture: Architecture, values: dict[str, Any], directory: Path) -> Tensors:
    """Write config.json and model.safetensors; returns the tensors."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors = write_all(architecture.links(config), to_tensors(config, model))
    partial = directory / f"{SINGLE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, directory / SINGLE)
    (directory / "config.json").write_text(json.dumps({**values, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    return tensors


def _shapes(config: LMConfig, specs: LM) -> dict[str, tuple[int, ...]]:
    """Shape of every exported tensor of ours, by name."""
    shapes = {}
    for name, spec in named_leaves(specs):
        one = spec.shape[1:] if name.startswith("stack.period.") else spec.shape
        shapes |= dict.fromkeys(layer_names(config, name), tuple(one))
    return shapes
