"""Rules and costs that the sizes of many mixers share."""

from collections.abc import Iterator

from mlt.config.base import Config
from mlt.config.problems import Problem


def recurrence_flops(num_heads: int, key_dim: int, value_dim: int, seq_len: int, *, rule: str = "add") -> float:
    """FLOPs per token of `linear_recurrence` in its chunked form, chunks of 64."""
    chunk = min(64, seq_len)
    if rule == "delta":
        per_head = chunk * (3 * key_dim + 2 * value_dim) + chunk**2 / 3 + 3 * key_dim * value_dim
    else:
        per_head = chunk * (key_dim + value_dim) + 2 * key_dim * value_dim
    return 2 * num_heads * per_head


def not_positive(config: Config, *names: str) -> Iterator[Problem]:
    """The first of these sizes that is set and below 1; the rules that divide by sizes must not run then."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            yield Problem(name, value, "must be at least 1")
            return


def rope_problems(config: Config, width: str = "head_dim") -> Iterator[Problem]:
    """Rules of `rope_base`, None without rotary positions, and of the width that it turns in pairs of channels."""
    base, size = (getattr(config, name) for name in ("rope_base", width))
    if base is not None and base <= 0:
        yield Problem("rope_base", base, "must be positive", "None turns it off")
    if base is not None and size % 2:
        yield Problem(width, size, "must be even under rotary positions", "use an even width or rope_base=None")


def not_divisor(config: Config, part: str, whole: str) -> Iterator[Problem]:
    """A problem unless the size `part` (None stands for `whole`) divides the size `whole`."""
    size, total = getattr(config, part), getattr(config, whole)
    if size is not None and total % size:
        divisors = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        yield Problem(part, size, f"must divide {whole} = {total}", f"use {divisors}")
