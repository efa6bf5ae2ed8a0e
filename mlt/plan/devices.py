"""The accelerators that a run can be planned for, as their makers' data sheets have them."""

import dataclasses
import difflib
import re

from mlt.errors import UserError
from mlt.train.throughput import PEAK_FLOPS

GIB = 2**30
USABLE = 0.92
"""Share of a device's memory that arrays can have: the rest is the driver's, the collectives' and the allocator's."""

MATRIX_SHARE, COPY_SHARE = 0.8, 0.88
"""Of a data sheet's rates, what the largest products and copies reach: 790 of 989 TFLOP/s and 4.3 of 4.8 TB/s on an H200."""


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    Attributes:
        name: as `--devices` takes it.
        memory: bytes.
        flops: dense bfloat16 FLOP/s.
        copy: bytes a second between memory and chip.
        link: bytes a second that a device receives from its neighbours, NVLink or ICI.
        near: devices that such links join.
        network: bytes a second that a device receives from the others.
        platform: what JAX calls it.
        host: bytes a second to or from the host's memory.
    """

    name: str
    memory: int
    flops: float
    copy: float
    link: float
    near: int
    network: float
    platform: str = "gpu"
    host: float = 50e9

    @property
    def usable(self) -> int:
        return int(USABLE * self.memory)

    def matrix_rate(self, dtype: str) -> float:
        """FLOP/s of large products; float32 ones are taken at half the rate of bfloat16, as TF32 is."""
        return MATRIX_SHARE * self.flops / (1 if dtype == "bfloat16" else 2)

    @property
    def copy_rate(self) -> float:
        return COPY_SHARE * self.copy

    def receiving(self, span: int) -> tuple[float, str]:
        """Bytes a second among `span` devices that stand side by side, and over what."""
        return (self.link, "links") if span <= self.near else (self.network, "network")


def _gpu(name: str, gib: int, terabytes: float, link: float, near: int, network: float) -> Accelerator:
    rates = (PEAK_FLOPS[name.removesuffix("-40G")], terabytes * 1e12, link * 1e9)
    host = 25e9 if name.startswith("A100") else 200e9 if name == "GB200" else 50e9
    return Accelerator(name, gib * GIB, *rates, near, network * 1e9, host=host)


def _tpu(name: str, kind: str, gib: int, terabytes: float, link: float, near: int) -> Accelerator:
    rates = (PEAK_FLOPS[kind], terabytes * 1e12, link * 1e9)
    return Accelerator(name, gib * GIB, *rates, near, 12.5e9, "tpu", 16e9)


KNOWN = {
    one.name: one
    for one in (
        _gpu("A100-40G", 40, 1.56, 300, 8, 25),
        _gpu("A100", 80, 2.04, 300, 8, 25),
        _gpu("H100", 80, 3.35, 450, 8, 50),
        _gpu("H200", 141, 4.8, 450, 8, 50),
        _gpu("B200", 179, 7.7, 900, 8, 50),
        _gpu("GB200", 184, 8.0, 900, 72, 50),
        _tpu("v4", "TPU v4", 32, 1.2, 300, 4096),
        _tpu("v5e", "TPU v5 lite", 16, 0.82, 200, 256),
        _tpu("v5p", "TPU v5", 95, 2.77, 600, 8960),
        _tpu("v6e", "TPU v6 lite", 32, 1.64, 448, 256),
    )
}
"""Matrix rates are those that a run's MFU is counted by. GPUs: NVLink one way, and a network card of 400 Gbit/s (A100: 200) for
each. TPUs: all ICI links of a chip together."""


@dataclasses.dataclass(frozen=True)
class Pool:
    """So many devices of one kind."""

    count: int
    device: Accelerator

    def __str__(self) -> str:
        return f"{self.count} x {self.device.name}"


def parse_pool(text: str) -> Pool:
    """`64xH200`.

    Raises:
        UserError: no such device, or no number.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[x*]\s*(.+?)\s*", text, re.IGNORECASE)
    names = ", ".join(KNOWN)
    if match is None or int(match.group(1)) < 1:
        raise UserError(f"--devices {text}: must be a number and a kind, such as 64xH200; the kinds are {names}")
    kinds = {name.lower(): name for name in KNOWN}
    asked = match.group(2).lower().removeprefix("tpu").strip(" -")
    if asked not in kinds:
        near = difflib.get_close_matches(asked, kinds, n=1)
        hint = f"did you mean {kinds[near[0]]}? " if near else ""
        raise UserError(f"--devices {text}: there is no kind {match.group(2)!r} in the table; {hint}It has {names}")
    return Pool(int(match.group(1)), KNOWN[kinds[asked]])
