"""What `mlt check` prints for a config without problems."""

from mlt.config.check import check_run
from mlt.config.run import RunConfig
from mlt.model.count import parameter_table
from mlt.plan.text import plan_text


def check_text(config: RunConfig, *, params: bool = False) -> str:
    """The plan, and the parameter table if asked.

    Raises:
        ConfigError: every problem of the config.
        UserError: its files are not there.
    """
    check_run(config)
    specs = config.model.build(tuple(config.data.tokenizer.token_strings()))
    text = plan_text(config, specs)
    if params:
        rows = [("name", "shape", "axes", "init", "group"), *parameter_table(specs)]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        text += "\n" + "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    return text
