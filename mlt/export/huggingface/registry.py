"""Every architecture of the folder, found by name or by what a config of ours looks like."""

import functools
import importlib
import pkgutil
from typing import Any

from mlt.errors import UserError
from mlt.export.huggingface import architectures
from mlt.export.huggingface.architecture import Architecture, Unfit, same_function
from mlt.export.huggingface.fields import Fields
from mlt.model.lm import LMConfig


@functools.cache
def all_architectures() -> dict[str, Architecture]:
    """model_type -> its map, one per file."""
    names = sorted(module.name for module in pkgutil.iter_modules(architectures.__path__))
    found = [importlib.import_module(f"{architectures.__name__}.{name}").ARCHITECTURE for name in names]
    return {architecture.model_type: architecture for architecture in found}


def architecture_of(values: dict[str, Any], where: str) -> Architecture:
    """The map for a config.json.

    Raises:
        UserError: there is none.
    """
    kind, known = values.get("model_type"), all_architectures()
    if kind not in known:
        raise UserError(f"{where}: model_type = {kind!r} has no map; there are {', '.join(known)}")
    return known[kind]


def read_config(values: dict[str, Any], where: str) -> LMConfig:
    """Our config for a config.json.

    Raises:
        UserError: the architecture is not known, or a setting cannot be expressed; all of them are listed.
    """
    fields = Fields(values, where)
    config = architecture_of(values, where).read(fields)
    fields.finish()
    return config


def write_config(config: LMConfig, name: str | None = None) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that says all of a config of ours, and the fields of its config.json.

    Args:
        config: of the model.
        name: model_type to use; None tries all.

    Raises:
        UserError: none does; the message says what the nearest cannot say.
    """
    known = all_architectures()
    if name is not None and name not in known:
        raise UserError(f"model_type {name!r} has no map; there are {', '.join(known)}")
    if config.stack.hyper_connections is not None:
        raise UserError(
            f"the model has {config.stack.hyper_connections.streams} residual streams (stack.hyper_connections), and no "
            "architecture of transformers that mlt has a map for has more than one; write it under its own "
            "names, --format mlt"
        )
    reasons: dict[str, list[str]] = {}
    for kind, architecture in known.items() if name is None else [(name, known[name])]:
        try:
            values = {"model_type": kind, "architectures": [architecture.class_name], **architecture.write(config)}
            reasons[kind] = same_function(config, read_config(values, f"{kind} config.json"))
        except Unfit as unfit:
            reasons[kind] = [str(unfit)]
            continue
        except UserError as error:
            reasons[kind] = [str(error)]
            continue
        if not reasons[kind]:
            return architecture, values
    lines = [f"  {kind}: {found[0]}" + (f" (and {len(found) - 1} more)" if found[1:] else "") for kind, found in reasons.items()]
    raise UserError(
        "no architecture of transformers that mlt has a map for says all of this model's config:\n" + "\n".join(lines)
    )
