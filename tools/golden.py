"""Write the golden texts of every config: one screen of plan and parameters each.

    python tools/golden.py

A changed golden is a changed model: say why in the commit.
"""

import pathlib

from mlt.config.load import load_config
from mlt.model.count import count, parameter_table
from mlt.train.setup import describe_model

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "golden"


def configs() -> list[pathlib.Path]:
    return sorted((ROOT / "configs").rglob("*.py"))


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


if __name__ == "__main__":
    for path in configs():
        golden_path(path).write_text(golden_text(path))
        print(f"wrote {golden_path(path).relative_to(ROOT)}")
