"""Which runs a comparison is made of: every config with every combination of arguments, and run directories as they are."""

import dataclasses
import inspect
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlt.config.load import load_config, sibling
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.run_paths import RunPaths


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a comparison.

    Attributes:
        label: its row in the table; runs that differ in their seed alone have one.
        name: of the run, and of its directory.
        config: what it trains.
        paths: where it lives.
        source: the config file or run directory that it comes from.
        args: arguments of the config function.
    """

    label: str
    name: str
    config: RunConfig
    paths: RunPaths
    source: Path
    args: Mapping[str, str]


def planned_runs(
    configs: Sequence[Path], out: Path | None, args: Sequence[str], sets: Sequence[str], seeds: Sequence[int] = ()
) -> list[Planned]:
    """Every run, in the order of the command line; nothing is written, no rule of a config checked.

    Args:
        configs: `.py` files, `.yaml` files, run directories.
        out: where runs of files live, each in a folder with its name.
        args: `name=v1,v2,...`, or `name=v1;v2` where values hold commas: every combination is a run. An argument goes to the
            files whose function takes it.
        sets: replacements in every file's config.
        seeds: values of `train.seed`, each a run; none leaves the configs' own.

    Raises:
        UserError: an argument that no file takes, two runs of one name, or no place to train a file's config in.
    """
    grid = _values(args)
    known = {path: _parameters(path) for path in configs}
    for name in grid:
        if not any(name in parameters for parameters in known.values()):
            takes = "; ".join(f"{path} takes {', '.join(names) or 'none'}" for path, names in known.items())
            raise UserError(f"--arg {name}: no config of this comparison takes it ({takes})")
    if seeds and len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {','.join(map(str, seeds))}: every seed once")
    found: list[Planned] = []
    folders = [path.resolve().name for path in configs if path.is_dir()]
    for path in configs:
        if path.is_dir():
            name = path.resolve().name
            label = name if folders.count(name) == 1 else str(path)
            found.append(Planned(label, label, load_config(path, root=RunConfig, check=False), RunPaths(path), path, {}))
            continue
        if out is None:
            raise UserError(f"{path} is to be trained: say where the runs are to live with --out DIR")
        found += _of_file(path, out, {name: values for name, values in grid.items() if name in known[path]}, sets, seeds)
    by_name: dict[str, Planned] = {}
    for run in found:
        other = by_name.setdefault(run.name, run)
        if other is not run:
            raise UserError(f"{other.source} and {run.source} both make a run {run.name}; name each once, or rename a file")
    return found


def _of_file(
    path: Path, out: Path, grid: Mapping[str, Sequence[str]], sets: Sequence[str], seeds: Sequence[int]
) -> list[Planned]:
    runs = []
    for values in itertools.product(*grid.values()):
        args = dict(zip(grid, values, strict=True))
        texts = [f"{name}={value}" for name, value in args.items()]
        varied = [text for text, all_values in zip(texts, grid.values(), strict=True) if len(all_values) > 1]
        label = " ".join([path.stem, *varied])
        config = load_config(path, args=texts, sets=sets, root=RunConfig, check=False)
        for seed in seeds or (None,):
            own = config if seed is None else config.replace(train=config.train.replace(seed=seed))
            name = "-".join([path.stem, *varied, *([f"seed={seed}"] if len(seeds) > 1 else [])]).replace("/", "_")
            runs.append(Planned(label, name, own, RunPaths(out / name), path, args))
    return runs


def _values(args: Sequence[str]) -> dict[str, list[str]]:
    grid: dict[str, list[str]] = {}
    for text in args:
        name, equals, values = text.partition("=")
        name = name.strip()
        if not equals or name in grid:
            raise UserError(f"--arg {text}: must be name=value or name=value,value, each name once; for example rho=1.0,0.5")
        grid[name] = [value.strip() for value in values.split(";" if ";" in values else ",")]
        if len(set(grid[name])) < len(grid[name]):
            raise UserError(f"--arg {text}: every value once")
    return grid


def _parameters(path: Path) -> list[str]:
    """Names of the arguments that a config file's function takes."""
    if path.suffix != ".py" or not path.is_file():
        return []
    function = getattr(sibling(str(path), path.name), "config", None)
    return list(inspect.signature(function).parameters) if callable(function) else []
