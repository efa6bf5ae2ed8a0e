"""Numbers, times and text as a reader wants them."""

import math
import time


def number(value: float) -> str:
    """Four significant digits: 3.142, 0.0003142, 31,420."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = 3 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}"
    return f"{value:.3e}"


def amount(value: float | None) -> str | None:
    """A count with a unit of size: 950, 12.3k, 4.56M, 7.89B; None stays None."""
    if value is None or not math.isfinite(value):
        return None
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}" if value < 999.5 * scale else f"{value / scale:,.0f}{unit}"
    return f"{value:.3g}"


def byte_size(value: float) -> str:
    """Bytes in binary units: 512 B, 1.5 KiB, 2.3 GiB."""
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} B"


def power(value: float) -> str:
    """A small number by its power of ten: 3e-4, 2.5e-05 as 2.5e-5."""
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def duration(seconds: float) -> str:
    """The two largest units: 4.2 s, 3m 20s, 5h 12m, 3d 4h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if minutes < 60:
        return f"{minutes}m {int(seconds % 60)}s"
    return f"{hours}h {minutes % 60}m" if hours < 24 else f"{days}d {hours % 24}h"


def moment(seconds: float) -> str:
    """A time of day in the zone of this machine."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def printable(text: str) -> str:
    """Text with every character that HTML does not allow, such as NUL, shown as a replacement mark."""
    return "".join(char if char in "\n\t" or char.isprintable() else "\ufffd" for char in text)
