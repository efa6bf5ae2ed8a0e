"""Print the table of the model families, or write it into docs/families.md.

    python tools/family_table.py [--write]

Parameters are those of the described model, tables included; FLOPs are forward ones a token, averaged over rows of 4,096
tokens; the state is everything that decoding keeps for one sequence after 131,072 tokens, with a bfloat16 stream. Nothing is
allocated.
"""

import pathlib
import sys
from types import ModuleType
from typing import Any

from mlt.config.load import sibling
from mlt.data.tokenize import ByteTokenizer
from mlt.model.count import count, decoding_bytes

ROOT = pathlib.Path(__file__).parent.parent
DOC = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- family table: python tools/family_table.py --write -->\n", "<!-- end of the family table -->\n"
TOKENS = ByteTokenizer().token_strings()
"""What the families' own data is made of; mixers that compress tokens are built for them."""
UNITS = {"M": 1e6, "B": 1e9}


def families() -> dict[str, ModuleType]:
    """Every family file, by name."""
    folder = ROOT / "configs" / "families"
    return {path.stem: sibling(str(folder / "any.py"), path.name) for path in sorted(folder.glob("*.py"))}


def agrees(params: int, stated: str) -> bool:
    """Whether a count is the stated one when it is rounded to as many digits: 2.7B to tenths, 130M to tens of millions."""
    number, unit = stated[:-1], UNITS[stated[-1]]
    decimals = len(number.partition(".")[2]) or len(number.rstrip("0")) - len(number)
    return round(params / unit, decimals) == float(number)


def row(name: str, paper: str, label: str, size: Any) -> list[str]:
    specs = size.model.build(TOKENS)
    total = count(size.model, specs, 4096)
    if size.published is None:
        verdict = size.note
    else:
        verdict = "rounds to it" if agrees(total.params, size.published) else "differs"
        verdict += f": {size.note}" if size.note else ""
    paper = f"[{paper}](https://arxiv.org/abs/{paper})"
    numbers = [_short(total.flops_per_token), _bytes(decoding_bytes(specs, 131_072))]
    return [name, paper, label, f"{total.params:,}", size.published or "-", verdict, *numbers]


def table() -> str:
    head = ["family", "paper", "size", "parameters", "published", "against the published count", "FLOPs/token", "state at 128k"]
    rows = [row(name, module.PAPER, label, size) for name, module in families().items() for label, size in module.SIZES.items()]
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def documented() -> str:
    """The table as the docs have it."""
    text = DOC.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def _short(value: float) -> str:
    return f"{value / 1e9:.2f}G" if value >= 1e9 else f"{value / 1e6:.2f}M"


def _bytes(value: int) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.2f} MiB"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        text = DOC.read_text()
        before, after = text[: text.index(BEGIN)], text[text.index(END) :]
        DOC.write_text(before + BEGIN + table() + after)
    else:
        print(table(), end="")
