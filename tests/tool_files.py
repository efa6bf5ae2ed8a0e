"""The scripts of tools/ as modules: what they print or write is tested where it belongs."""

import importlib.util
import pathlib
import sys
from types import ModuleType

TOOLS = pathlib.Path(__file__).parents[1] / "tools"


def tool(name: str) -> ModuleType:
    """A script, run as a module of a name of its own; while it is, it finds its neighbours as it does on a command line."""
    spec = importlib.util.spec_from_file_location(f"mlt_tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    sys.path.insert(0, str(TOOLS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module
