"""Throughput and waits between two logged steps."""

import time


class Clock:
    """Counts steps and data waits since the last reading."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.reset(0)

    def reset(self, step: int) -> None:
        self.step, self.wait, self.since = step, 0.0, time.perf_counter()

    def waited(self, seconds: float) -> None:
        self.wait += seconds

    def read(self, step: int) -> dict[str, float]:
        """Metrics since the last reading; call when step `step` has finished on the device."""
        elapsed = time.perf_counter() - self.since
        steps = max(step - self.step, 1)
        wait = self.wait
        self.reset(step)
        return {
            "throughput/tokens_per_second": steps * self.tokens_per_step / elapsed,
            "throughput/step_seconds": elapsed / steps,
            "data/wait_seconds": wait,
        }
