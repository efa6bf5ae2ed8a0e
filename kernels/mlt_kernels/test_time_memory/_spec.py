"""The static description of a test-time memory, and the state it carries."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

LM_NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Coefficients (a, b, c) of the five iterations of LaCT's language models."""
MUON_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""The same five times, as in Muon."""

NETS = ("linear", "mlp", "gated")
ACTIVATIONS = ("gelu", "silu")
LOSSES = ("l2", "dot", "lp", "huber_mix", "huber_norm", "huber_coord")
RULES = ("descent", "momentum", "mean", "chunk")
READS = ("token", "chunk")
LINKS = ("identity", "pnorm", "norm_cap", "mirror", "softmax")
SCALING_LINKS = ("identity", "pnorm", "norm_cap")


@dataclasses.dataclass(frozen=True)
class MemorySpec:
    """What is learned at test time, on which objective, by which rule, and what a token may read.

    Attributes:
      chunk_size: C. Inner gradients are taken at the weights that enter a document's chunk: part of the model, not a
        matter of speed.
      net: "linear" z = x W; "mlp" z = act(... act(x W_1) ...) W_L; "gated" z = (act(x W_1) * (x W_2)) W_3.
      activation: "gelu" (tanh form) or "silu".
      bias: every matrix has one more row, its bias.
      layer_norm: y = LayerNorm(z) with the outer `norm_scale` and `norm_bias`; y = z otherwise.
      residual: add the network's input to y.
      loss: with r = y - v, "l2" scale / 2 |r|^2; "dot" -y . v; "lp" sum (r^2 + 1e-6)^(power / 2); "huber_mix"
        |r|^2 / 2 if |r| <= threshold, else threshold sum |r|; "huber_norm" the same with threshold |r| - threshold^2 / 2;
        "huber_coord" the Huber loss of each coordinate.
      loss_scale: of "l2": 1 for TTT, 2 for Titans and Miras.
      power: p of "lp".
      rule: how the weights follow the gradients g_t, see `test_time_memory`.
      read: "token" reads the weights after token t's own write; "chunk" those that entered the chunk
        (apply, then update).
      link: from the accumulator A to the weights W, per matrix: "identity"; "pnorm" A / |A|_q^(q-2) (Moneta as
        printed, |A|_q at least 1e-3); "norm_cap" A / max(1, |A|_q / cap); "mirror" sign(A) |A|^(q-1) / |A|_q^(q-2)
        (the p-norm mirror map); "softmax" over a matrix's last dim (Memora).
      link_power: q.
      link_cap: of "norm_cap".
      newton_schulz: coefficients of each iteration that orthogonalises a chunk's step; () leaves it as it is.
        Rule "chunk" only.
      row_norm: after each chunk, scale what feeds each unit to its norm in the initial memory. Rule "chunk" only.
      reset_every: tokens of a document after which the memory starts afresh, a multiple of chunk_size; 0 for never.
    """

    chunk_size: int
    net: Literal["linear", "mlp", "gated"] = "mlp"
    activation: Literal["gelu", "silu"] = "gelu"
    bias: bool = False
    layer_norm: bool = False
    residual: bool = False
    loss: Literal["l2", "dot", "lp", "huber_mix", "huber_norm", "huber_coord"] = "l2"
    loss_scale: float = 1.0
    power: float = 3.0
    rule: Literal["descent", "momentum", "mean", "chunk"] = "descent"
    read: Literal["token", "chunk"] = "token"
    link: Literal["identity", "pnorm", "norm_cap", "mirror", "softmax"] = "identity"
    link_power: float = 4.0
    link_cap: float = 1.0
    newton_schulz: tuple[tuple[float, float, float], ...] = ()
    row_norm: bool = False
    reset_every: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("net", NETS),
            ("activation", ACTIVATIONS),
            ("loss", LOSSES),
            ("rule", RULES),
            ("read", READS),
            ("link", LINKS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"MemorySpec: {name}={getattr(self, name)!r}; expected one of {', '.join(map(repr, allowed))}")
        if self.chunk_size < 1:
            raise ValueError(f"MemorySpec: chunk_size={self.chunk_size}; expected at least 1")
        if self.reset_every < 0 or self.reset_every % self.chunk_size:
            raise ValueError(
                f"MemorySpec: reset_every={self.reset_every}; expected 0 or a multiple of chunk_size={self.chunk_size}"
            )
        if self.read == "token" and self.rule == "chunk":
            raise ValueError("MemorySpec: read='token' with rule='chunk'; expected read='chunk': a chunk's step sees its tokens")
        if self.read == "token" and self.link not in SCALING_LINKS:
            raise ValueError(f"MemorySpec: read='token' with link={self.link!r}; expected read='chunk', or a scaling link")
        if self.rule in ("mean", "chunk") and self.link != "identity":
            raise ValueError(f"MemorySpec: link={self.link!r} with rule={self.rule!r}; expected rule 'descent' or 'momentum'")
        if self.rule == "mean" and self.read == "chunk":
            raise ValueError("MemorySpec: read='chunk' with rule='mean'; expected read='token'")
        if self.rule != "chunk" and (self.newton_schulz or self.row_norm):
            raise ValueError(f"MemorySpec: newton_schulz or row_norm with rule={self.rule!r}; expected rule='chunk'")
        if self.bias and (self.newton_schulz or self.row_norm or self.link != "identity"):
            raise ValueError("MemorySpec: bias with newton_schulz, row_norm or a link; expected bias=False")
        if self.link == "pnorm" and self.link_power == 3.0:
            raise ValueError("MemorySpec: link='pnorm' with link_power=3; that map forgets the size of what it maps")

    @property
    def running(self) -> bool:
        """The weights move token by token; else steps are collected and applied as one at the end of a chunk."""
        return self.rule in ("descent", "momentum")


class MemoryState(NamedTuple):
    """A memory in the middle of a document, float32. Entries a rule has no use for are empty tuples or None."""

    weights: tuple[Array, ...]  # A: (B, H, a, b) a matrix
    steps: tuple[Array, ...]  # "momentum": S; "mean", "chunk": minus the weighted gradients of this chunk so far
    anchor: tuple[Array, ...]  # A as it entered this chunk, where `weights` moves on token by token
    previous: tuple[Array, ...]  # "chunk" with momentum: the step of the chunk before
    gate_sum: Array | None  # "chunk" with momentum: (B, H), the sum of the momentum gates of this chunk so far
    position: Any  # (B,) int32: tokens of the document seen so far


def kept(spec: MemorySpec, momentum: bool) -> dict[str, bool]:
    """Which copies of the weights a state holds beside the weights themselves."""
    return {
        "steps": spec.rule != "descent",
        "anchor": spec.running,
        "previous": spec.rule == "chunk" and momentum,
    }


def copies(spec: MemorySpec, momentum: bool = False) -> int:
    """How many times the size of the memory a state holds: what decoding keeps for a head."""
    return 1 + sum(kept(spec, momentum).values())


def started(weights: tuple[Array, ...], spec: MemorySpec, momentum: bool) -> MemoryState:
    """The state whose weights are `weights`, each (B, H, a, b), at the start of a document."""
    parts = kept(spec, momentum)
    zeros = tuple(jnp.zeros_like(w) for w in weights)
    batch, heads = weights[0].shape[:2]
    return MemoryState(
        weights=weights,
        steps=zeros if parts["steps"] else (),
        anchor=weights if parts["anchor"] else (),
        previous=zeros if parts["previous"] else (),
        gate_sum=jnp.zeros((batch, heads), weights[0].dtype) if parts["previous"] else None,
        position=jnp.zeros((batch,), jnp.int32),
    )


def options(spec: MemorySpec) -> dict[str, Any]:
    """Which gates the spec has a use for: name -> needed ("required", "optional") ; others must be None."""
    momentum = {"momentum": "required", "chunk": "optional"}.get(spec.rule, "none")
    return {
        "log_decay": "optional" if spec.running else "none",
        "log_momentum": momentum,
        "threshold": "required" if spec.loss.startswith("huber") else "none",
        "row_weight": "optional" if spec.rule == "mean" else "none",
        "norm_scale": "optional" if spec.layer_norm else "none",
        "norm_bias": "optional" if spec.layer_norm else "none",
    }
