"""LongMamba (arXiv 2504.16053): reading further than a Mamba was trained for, without training.

A channel whose memory spans the training length is *global*: what its decay leaves of the first token after that many
tokens, exp(A sum Delta), is more than `cutoff`. Over a longer text its steps add up to more, and it forgets what it kept in
training. So in global channels tokens with a small step are skipped, Delta = 0: no decay and no write. The threshold is the
step at which the larger steps of a text of that length add up to what all of them did over the training length.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.errors import UserError
from mlt.loss import context_of
from mlt.mixers.sequence.mamba import MambaMixer
from mlt.mixers.sequence.mamba2 import Mamba2Mixer
from mlt.model.lm import LM
from mlt.model.remat import Remat
from mlt.nn.param import Buffer
from mlt.parallel.rules import Rules

Steps = list[np.ndarray]
"""For each recurrence of a model, in depth order, its steps over calibration rows: (layers, rows, T, channels) float32."""


class LongMamba(Config):
    """Attributes:
    train_length: tokens of the rows that the model was trained on.
    cutoff: share of a first token's write that is left after `train_length` tokens in a global channel, at least.
    clamped: share of the largest steps that are cut down to the next one before that share is computed.
    """

    train_length: int
    cutoff: float = 0.05
    clamped: float = 0.1

    def problems(self) -> Iterator[Problem]:
        if self.train_length < 1:
            yield Problem("train_length", self.train_length, "must be at least 1")
        for name in ("cutoff", "clamped"):
            if not 0 <= getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must lie in [0, 1)")

    def extend(self, model: LM, steps: Steps, length: int) -> LM:
        """The model for prompts of `length` tokens; the same model where that is no more than `train_length`.

        Tokens that come one at a time (decoding) are read as they were. Prompts of another length want other thresholds.

        Args:
            steps: from `calibrate`, over rows of at least `train_length` tokens.
        """
        if length <= self.train_length:
            return model
        new = jax.tree.map(lambda leaf: leaf, model)
        for mixer, taken in zip(_recurrences(new), steps, strict=True):
            cut = _before_softplus(
                mixer, np.stack([self.thresholds(_rates(mixer, i), taken[i], length) for i in range(len(taken))])
            )
            name = _name(mixer)
            setattr(mixer, name, Skipping(getattr(mixer, name), cut.reshape(mixer.dt_bias[...].shape)))
        return new

    def thresholds(self, rate_IN: np.ndarray, steps_BTI: np.ndarray, length: int) -> np.ndarray:
        """The largest step that is skipped in each channel (I,), 0 in those that are not global.

        Args:
            rate_IN: -A of the N states of each channel.
            steps_BTI: steps over calibration rows.
        """
        rows, have = steps_BTI.shape[:2]
        if have < self.train_length:
            raise UserError(f"calibration rows have {have} tokens; give at least train_length = {self.train_length}")
        steps = steps_BTI[:, : self.train_length].astype(np.float64)
        total_BI = np.minimum(steps, np.quantile(steps, 1 - self.clamped, axis=1, keepdims=True)).sum(1)
        left_I = np.exp(-rate_IN * total_BI.mean(0)[:, None]).mean(1)
        # The steps of a text of `length` tokens are those of the rows, each standing for `each` tokens.
        each = length / (rows * self.train_length)
        descending = -np.sort(-steps.reshape(-1, steps.shape[-1]), axis=0)
        reached = np.cumsum(descending, axis=0) * each >= steps.sum((0, 1)) / rows
        first = np.argmax(reached, axis=0)
        return np.where(left_I > self.cutoff, np.take_along_axis(descending, first[None], axis=0)[0], 0.0)


def calibrate(model: LM, batch: dict[str, np.ndarray], rules: Rules, *, dtype: jnp.dtype, remat: Remat) -> Steps:
    """The steps that every Mamba and Mamba-2 layer takes on a batch of whole rows.

    Raises:
        UserError: the model has no such layer.
    """
    tapped, found = jax.tree.map(lambda leaf: leaf, model), {}
    recurrences = list(_recurrences(tapped))
    if not recurrences:
        raise UserError("LongMamba: the model has no Mamba or Mamba2 layer; it is for those alone")
    for number, mixer in enumerate(recurrences):
        if getattr(mixer.config, "step_limit", None) is not None and mixer.config.step_limit[0] > 0:
            raise UserError(
                f"LongMamba: step_limit = {mixer.config.step_limit} has no step of 0, which skips a token; use (0, ...)"
            )
        bias = mixer.dt_bias[...]
        layers = np.arange(len(bias)) if bias.ndim > 1 else np.asarray(0)

        def keep(layer: np.ndarray, value: np.ndarray, number: int = number) -> None:
            found[number, int(layer)] = np.asarray(value)

        name = _name(mixer)
        setattr(mixer, name, _Tap(getattr(mixer, name), layers, keep))
    run = jax.jit(lambda model, batch: model(context_of(batch, rules, train=False), dtype=dtype, remat=remat)[0])
    jax.block_until_ready(run(tapped, batch))
    jax.effects_barrier()
    taken = []
    for number, mixer in enumerate(recurrences):
        pre = np.stack([found[number, layer] for layer in range(np.size(mixer.dt_bias[...][..., 0]))])
        bias = np.asarray(mixer.dt_bias[...]).reshape(len(pre), 1, 1, -1)
        step = np.logaddexp(0, pre * _scale(mixer) + bias)
        limit = getattr(mixer.config, "step_limit", None)
        taken.append(step if limit is None else np.clip(step, *limit))
    return taken


class Skipping(nnx.Module):
    """The projection of a step whose token is skipped where it is at most `cut`: softplus takes -inf to a step of 0."""

    def __init__(self, inner: Any, cut: np.ndarray):
        self.inner, self.cut = inner, Buffer(jnp.asarray(cut, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.inner(x)
        if x.shape[1] == 1:
            return y
        return jnp.where(y.astype(jnp.float32) <= self.cut[...], -jnp.inf, y).astype(y.dtype)


class _Tap(nnx.Module):
    """A projection that also hands what it gives to the host, with its layer."""

    def __init__(self, inner: Any, layer: np.ndarray, keep: Any):
        self.inner, self.layer, self.keep = inner, Buffer(jnp.asarray(layer)), keep

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.inner(x)
        jax.debug.callback(self.keep, self.layer[...], y.astype(jnp.float32))
        return y


def _recurrences(node: Any) -> Iterator[Any]:
    """Every Mamba and Mamba-2 mixer below a module, those inside other mixers too, in depth order."""
    if isinstance(node, (MambaMixer, Mamba2Mixer)):
        yield node
    elif isinstance(node, nnx.Module):
        parts = list(node) if isinstance(node, nnx.List) else list(vars(node).values())
        for part in parts:
            yield from _recurrences(part)


def _name(mixer: Any) -> str:
    return "step_size" if isinstance(mixer, Mamba2Mixer) else "step_out"


def _scale(mixer: Any) -> float:
    scales = getattr(mixer.config, "projection_scales", None)
    return 1.0 if scales is None else scales[4]


def _rates(mixer: Any, layer: int) -> np.ndarray:
    """-A of the states of each channel of a layer, (I, N); a head of Mamba-2 has one."""
    rate = np.exp(np.asarray(mixer.A_log[...], np.float64))
    stacked = mixer.dt_bias[...].ndim > 1
    rate = rate[layer] if stacked else rate
    return rate[:, None] if rate.ndim == 1 else rate


def _before_softplus(mixer: Any, threshold: np.ndarray) -> np.ndarray:
    """What the projection gives for a step of this size, (layers, I); -inf for 0."""
    bias = np.asarray(mixer.dt_bias[...], np.float64).reshape(threshold.shape)
    with np.errstate(divide="ignore"):
        return (threshold + np.log(-np.expm1(-threshold)) - bias) / _scale(mixer)
