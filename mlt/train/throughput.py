"""How well a step uses its devices: model FLOPs utilization and peak memory, where they can be known."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlt.config.run import RunConfig
from mlt.model.streams import stream_flops

PEAK_FLOPS: dict[str, float] = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 FLOP/s of a device by words of its name, from the makers' data sheets; the longest that fits counts."""


def peak_flops(device_kind: str) -> float | None:
    """The data sheet's dense bfloat16 rate; None for a device that is not in the table."""
    words = [word for word in PEAK_FLOPS if word in device_kind]
    return PEAK_FLOPS[max(words, key=len)] if words else None


class Utilization:
    """FLOPs of the model, as its mixers count them: causal attention halved, no recomputation, tables as look-ups."""

    def __init__(self, config: RunConfig, *, device_kind: str, num_devices: int) -> None:
        self._config, self._known = config, {}
        rate = peak_flops(device_kind)
        self._rate = None if rate is None else rate * num_devices

    def metrics(self, tokens_per_second: float, segment_ids_BT: np.ndarray) -> dict[str, float]:
        """`throughput/mfu` at this speed, for documents that lie as they do in these rows; nothing on an unknown device."""
        if self._rate is None:
            return {}
        return {"throughput/mfu": tokens_per_second * self.flops_per_token(segment_ids_BT) / self._rate}

    def flops_per_token(self, segment_ids_BT: np.ndarray) -> float:
        """Forward and backward (twice the forward) FLOPs per position, averaged over the rows.

        A token sees its own document only, so a row of short documents costs less attention than one long one. Padding, which
        the throughput counts, is no work of the model.
        """
        lengths = np.concatenate([np.unique(row[row > 0], return_counts=True)[1] for row in segment_ids_BT])
        if not len(lengths):
            return 0.0
        return 3 * float(sum(self._forward(int(length)) * length for length in lengths)) / segment_ids_BT.size

    def _forward(self, length: int) -> float:
        if length not in self._known:
            model = self._config.model
            flops = sum(mixer.flops_per_token(model.d_model, length) for mixer in model.stack.mixers())
            self._known[length] = flops + 2 * model.d_model * model.vocab_size + stream_flops(model.stack, model.d_model)
        return self._known[length]


def memory_metrics(program_bytes: int | None) -> Mapping[str, float]:
    """`memory/peak_bytes` of this process's fullest device; where devices do not tell, what the step's program needs."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    if known:
        return {"memory/peak_bytes": max(known)}
    return {} if program_bytes is None else {"memory/program_bytes": program_bytes}


def program_bytes(compiled: Any) -> int | None:
    """Bytes that a compiled program needs on each device: arguments, results and temporaries; None if it does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    parts = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    return int(sum(parts) - found.alias_size_in_bytes)
