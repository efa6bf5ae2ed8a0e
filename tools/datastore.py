"""A nearest-neighbour datastore of a run, and the targets that another run trains on (docs/side_memories.md).

    python tools/datastore.py build RUN_DIR STORE [--data CONFIG [--arg name=value ...]] [--layer N]
    python tools/datastore.py search STORE TARGETS --neighbours 1024 --temperature 16

`build` runs the model over the documents for training, those of RUN_DIR or of another config, and keeps its hidden states.
`search` finds the neighbours of each, exactly, and prints what to put into a config's data section.
"""

import argparse
import sys
from pathlib import Path

from mlt.config.load import load_config
from mlt.errors import UserError
from mlt.evals.datastore import build, search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="write the hidden states of a run")
    make.add_argument("run_dir", type=Path)
    make.add_argument("store", type=Path)
    make.add_argument("--data", metavar="CONFIG", help="take the documents of this config")
    make.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="argument of its function; may repeat")
    make.add_argument("--step", type=int, help="checkpoint; the newest by default")
    make.add_argument("--layer", type=int, help="the stream behind so many layers; by default the final states")
    make.add_argument("--window", type=int, help="tokens that the model sees; by default the run's row length")
    make.add_argument("--overlap", type=int, help="of them seen before; by default a half")
    make.add_argument("--rows", type=int, default=8, help="windows run at once (8)")
    find = commands.add_parser("search", help="write the distributions that neighbours give")
    find.add_argument("store", type=Path)
    find.add_argument("targets", type=Path)
    find.add_argument("--neighbours", type=int, default=1024, help="of each entry, its own left out (1024)")
    find.add_argument("--temperature", type=float, default=16.0, help="of exp(-squared distance / T) (16)")
    find.add_argument("--width", type=int, help="tokens kept of a distribution; by default all")
    given = parser.parse_args()
    if given.command == "build":
        data = None if given.data is None else load_config(given.data, args=given.arg, check=False).data
        names = ("step", "layer", "window", "overlap", "rows")
        build(given.run_dir, given.store, say=print, data=data, **{name: getattr(given, name) for name in names})
        return
    names = ("neighbours", "temperature", "width")
    found = search(given.store, given.targets, say=print, **{name: getattr(given, name) for name in names})
    fields = f"folder={str(given.targets)!r}, digest={found['digest']!r}, width={found['width']}"
    print(f"wrote {given.targets}; in the config's data section:\n  neighbours=Neighbours({fields})")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"datastore: {error}")
