"""The guard of the train step: an update made from a loss or gradient that cannot be right is left out, on all hosts alike.

The decision is part of the compiled step and made of values that every device holds, so no host can decide otherwise.
What follows on the host (the record, the rollback, the end) is in `mlt.train.skips`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mlt.config.base import Config
from mlt.config.problems import Problem

WINDOW = 128
"""Accepted steps whose loss and gradient norm the train state keeps."""


class GuardConfig(Config):
    """What makes a step's update be left out, and what happens when that goes on.

    Attributes:
        spike_sigmas: a loss or gradient norm above the mean of the last accepted steps by more than this many standard
            deviations skips the update; None looks only at what is not finite. OLMo-core and MaxText use 6, on request.
        window: how many accepted steps the mean is over, at most 128; nothing is a spike before half as many are there.
        max_consecutive_skips: skipped steps in a row after which the run goes back to a checkpoint; 0 skips nothing and
            ends the run at the first step that would have been skipped.
        max_rollbacks: how often in the run it goes back; the next time the run ends.
    """

    spike_sigmas: float | None = None
    window: int = WINDOW
    max_consecutive_skips: int = 10
    max_rollbacks: int = 2

    def problems(self) -> Iterator[Problem]:
        if self.spike_sigmas is not None and self.spike_sigmas <= 0:
            yield Problem("spike_sigmas", self.spike_sigmas, "must be positive", "None turns it off; 6 is published")
        if not 2 <= self.window <= WINDOW:
            yield Problem("window", self.window, f"must lie in [2, {WINDOW}]")
        for name in ("max_consecutive_skips", "max_rollbacks"):
            if getattr(self, name) < 0:
                yield Problem(name, getattr(self, name), "must not be negative")

    @property
    def skips(self) -> bool:
        """Whether a step's update is left out at all."""
        return self.max_consecutive_skips > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardState:
    """What the guard remembers; part of the train state, saved and restored with it.

    Attributes:
        losses: float32 (WINDOW,), of the last accepted steps, in a ring.
        norms: float32 (WINDOW,), their gradient norms.
        accepted: int32, accepted steps.
        consecutive: int32, skipped steps since the last accepted one.
        skipped: int32, skipped steps.
    """

    losses: jax.Array
    norms: jax.Array
    accepted: jax.Array
    consecutive: jax.Array
    skipped: jax.Array


def fresh_guard() -> GuardState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return GuardState(jnp.zeros(WINDOW), jnp.zeros(WINDOW), zero, zero, zero)


def judge(
    guard: GuardState, loss: jax.Array, norm: jax.Array, config: GuardConfig
) -> tuple[jax.Array, GuardState, dict[str, jax.Array]]:
    """Whether a step's update is to be made.

    A value v of loss or gradient norm is refused where it is not finite, or, with `spike_sigmas` = k, where
    v > mean + k * deviation over the last `window` accepted steps (deviation with n - 1), once window / 2 are there.

    Args:
        guard: the state before this step.
        loss: float32 scalar.
        norm: global gradient norm before clipping, float32 scalar.
        config: the rule.

    Returns:
        (bool scalar, the state after this step, float32 scalars to log).
    """
    accept, limits = jnp.isfinite(loss) & jnp.isfinite(norm), {}
    if config.spike_sigmas is not None:
        limits = {"loss": _limit(guard, guard.losses, config), "grad_norm": _limit(guard, guard.norms, config)}
        accept &= (loss <= limits["loss"]) & (norm <= limits["grad_norm"])
    place = guard.accepted % WINDOW
    new = GuardState(
        losses=guard.losses.at[place].set(jnp.where(accept, loss, guard.losses[place])),
        norms=guard.norms.at[place].set(jnp.where(accept, norm, guard.norms[place])),
        accepted=guard.accepted + accept,
        consecutive=jnp.where(accept, 0, guard.consecutive + 1),
        skipped=guard.skipped + ~accept,
    )
    told = {
        "guard/skipped": ~accept,
        "guard/consecutive_skips": new.consecutive,
        "guard/skipped_steps": new.skipped,
        **{f"guard/{name}_limit": limit for name, limit in limits.items()},
    }
    return accept, new, {name: value.astype(jnp.float32) for name, value in told.items()}


def choose(accept: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the step is accepted, else `old` to the bit, leaf by leaf; one pass fused with the update itself."""
    return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)


def _limit(guard: GuardState, values: jax.Array, config: GuardConfig) -> jax.Array:
    """Mean plus `spike_sigmas` standard deviations of the last accepted values; infinite while they are too few."""
    assert config.spike_sigmas is not None
    age = (guard.accepted - 1 - jnp.arange(WINDOW)) % WINDOW  # 0 is the newest
    count = jnp.minimum(guard.accepted, config.window)
    weight = (age < count).astype(jnp.float32)
    mean = jnp.sum(weight * values) / jnp.maximum(count, 1)
    variance = jnp.sum(weight * jnp.square(values - mean)) / jnp.maximum(count - 1, 1)
    enough = count >= max(2, config.window // 2)
    return jnp.where(enough, mean + config.spike_sigmas * jnp.sqrt(variance), jnp.inf)
