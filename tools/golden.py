"""Write the golden texts of every config: one screen of plan and parameters each, or what its train step sends.

    python tools/golden.py
    python tools/golden.py --collectives [CONFIG ...]

A changed golden is a changed model, or a changed program: say why in the commit. Collectives are those of a small
instance over 8 simulated devices, as the JAX version on the first line compiles it.
"""

import pathlib
import sys

import jax

from mlt.config.load import load_config
from mlt.model.count import count, parameter_table
from mlt.parallel.mesh import Layout
from mlt.plan.collectives import summary
from mlt.train.setup import describe_model
from mlt.verify.mesh import MeshStep, rows_for

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "golden"


def configs() -> list[pathlib.Path]:
    """Every config, families in their small size; what is under `base` is read by others."""
    return sorted(path for path in (ROOT / "configs").rglob("*.py") if path.parent.name != "base")


def golden_path(config: pathlib.Path) -> pathlib.Path:
    return FOLDER / (".".join(config.relative_to(ROOT / "configs").with_suffix("").parts) + ".txt")


def golden_text(path: pathlib.Path) -> str:
    """Counts and the parameter table; equal mixers at equal sizes print equal lines."""
    config = load_config(path)
    specs = describe_model(config)
    total = count(config.model, specs, config.data.sequence_length)
    head = f"{total.params} parameters, {total.table_params} in tables, {total.active_params} active per token\n"
    head += f"{total.flops_per_token:.0f} forward FLOPs per token, {total.state_values} state values per sequence\n\n"
    rows = parameter_table(specs)
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return head + "".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows)


SENDING = {"width": "32", "sequence_length": "192", "batch_size": "2"}
LAYOUT = Layout(context=4, fsdp=2, attention="zigzag")


def collectives_path(config: pathlib.Path) -> pathlib.Path:
    return golden_path(config).with_suffix(".collectives.txt")


def sending_step(path: pathlib.Path) -> MeshStep:
    """The compiled train step whose collectives are kept."""
    config = load_config(path, args=[f"{name}={value}" for name, value in SENDING.items()])
    return MeshStep(config, LAYOUT, rows_for(config, LAYOUT, 0), quick=True)


def collectives_text(step: MeshStep) -> str:
    return f"jax {jax.__version__}, context=4, fsdp=2\n{summary(step.collectives())}\n"


if __name__ == "__main__":
    if "--collectives" in sys.argv:
        jax.config.update("jax_num_cpu_devices", 8)
        for path in [pathlib.Path(name).resolve() for name in sys.argv[2:]] or [ROOT / "configs" / "quickstart.py"]:
            collectives_path(path).write_text(collectives_text(sending_step(path)))
            print(f"wrote {collectives_path(path).relative_to(ROOT)}")
        sys.exit()
    for path in configs():
        golden_path(path).write_text(golden_text(path))
        print(f"wrote {golden_path(path).relative_to(ROOT)}")
