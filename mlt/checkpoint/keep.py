"""Which steps stay when newer ones have been committed."""

import dataclasses
from collections.abc import Collection, Iterable


@dataclasses.dataclass(frozen=True)
class Keep:
    """Attributes:
    newest: how many of the newest steps stay.
    every_steps: steps divisible by this stay for good; None has no such steps.
    """

    newest: int
    every_steps: int | None = None

    def __post_init__(self) -> None:
        if self.newest < 1:
            raise ValueError(f"keep={self.newest} would delete every checkpoint; it must be at least 1")
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"keep_every_steps={self.every_steps} must be at least 1")

    def superfluous(self, steps: Iterable[int], pinned: Collection[int] = ()) -> list[int]:
        """List the steps to delete: neither new enough, nor divisible, nor pinned."""
        ordered = sorted(steps)
        return [
            step
            for step in ordered[: -self.newest]
            if step not in pinned and not (self.every_steps and step % self.every_steps == 0)
        ]
