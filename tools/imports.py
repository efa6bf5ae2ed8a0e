"""Check who imports whom (ARCHITECTURE.md): each package may import only what stands below it.

    python tools/imports.py

prints every import that points the wrong way and exits with 1 if there is one.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

COMMON = ("config", "errors", "run_paths")
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "run_paths": ("errors",),
    "config": ("errors",),
    "nn": ("kernels", "errors"),
    "bench": ("kernels", "errors"),
    "launch": (*COMMON, "config.run", "config.check"),
    "parallel": ("kernels", "nn", "config", "errors"),
    "mixers": ("kernels", "nn", "parallel", "config", "errors"),
    "model": ("kernels", "nn", "parallel", "mixers", "config", "errors"),
    "data": ("config", "errors"),
    "optim": ("nn", "parallel", "config", "errors"),
    "loss": ("kernels", "model", "mixers", "parallel"),
    "report": ("checkpoint", *COMMON),
    "plan": ("kernels", "optim", "model", "mixers", "parallel", "nn", "config", "errors", "train", "report"),
    "train": ("model", "mixers", "nn", "parallel", "data", "optim", "loss", "checkpoint", "report", "plan", *COMMON),
    "checkpoint": ("errors",),
    "export": ("model", "mixers", "nn", "parallel", "data", "train", "checkpoint", "config", "errors", "__init__"),
    "evals": ("model", "mixers", "nn", "parallel", "loss", "data", "train", "config", "errors"),
    "compare": ("model", "train", "checkpoint", "report", *COMMON, "config.run", "config.check"),
    "verify": (
        "model",
        "mixers",
        "nn",
        "parallel",
        "loss",
        "data",
        "train",
        "checkpoint",
        "plan",
        "config",
        "errors",
        "run_paths",
    ),
}
"""Package of mlt -> packages of mlt it may import, its own always included; "kernels" is mlt_kernels."""

ANYTHING = ("cli", "config.run", "config.check", "__init__")
"""The top: they see every section, and only the command, `train` and tools import them."""


def package(path: Path) -> str:
    parts = path.relative_to(ROOT / "mlt").with_suffix("").parts
    name = ".".join(parts)
    return name if name in ANYTHING else parts[0]


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.lineno, node.module))
    return found


def wrong_ways() -> list[str]:
    """Every import that points the wrong way, as `file:line: why`."""
    lines = []
    for path in sorted((ROOT / "mlt").rglob("*.py")):
        here = package(path)
        if here in ANYTHING:
            continue
        for line, module in imports(path):
            target = module.split(".")
            if target[0] == "mlt_kernels":
                there = "kernels"
            elif target[0] != "mlt":
                continue
            else:
                there = target[1] if len(target) > 1 else "__init__"
            if there != here and there not in ALLOWED.get(here, ()):
                lines.append(f"{path.relative_to(ROOT)}:{line}: {here} may not import {module}")
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for line, module in imports(path):
            if module.split(".")[0] in ("mlt", "flax", "optax", "orbax"):
                lines.append(f"{path.relative_to(ROOT)}:{line}: mlt_kernels imports jax alone, not {module}")
    return lines


if __name__ == "__main__":
    found = wrong_ways()
    print("\n".join(found) or "every import points down")
    sys.exit(bool(found))
