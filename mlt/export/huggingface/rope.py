"""Rotary positions in config.json: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` before it."""

import math
from typing import Any

from mlt.export.huggingface.fields import Fields
from mlt.mixers.rope_scaling import LinearRope, Llama3Rope, RopeScaling, YarnRope
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.latent_attention import LatentAttention

_YARN = {"beta_fast", "beta_slow", "attention_factor", "truncate", "mscale", "mscale_all_dim"}
_LLAMA3 = {"low_freq_factor", "high_freq_factor"}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}


def read_rope(f: Fields, head_dim: int, *, partial: float = 1.0) -> dict[str, Any]:
    """The rotary fields of Attention.

    Args:
        f: config.json.
        head_dim: width of a head.
        partial: rotated share of it where the file does not say.
    """
    parameters = dict(f.get("rope_parameters") or f.get("rope_scaling") or {})
    f.get("rope_scaling")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    base = parameters.get("rope_theta", f.get("rope_theta", 10_000.0))
    share = parameters.get("partial_rotary_factor", f.get("partial_rotary_factor", partial))
    f.get("rope_theta"), f.get("partial_rotary_factor")
    width = int(head_dim * share)
    known = _COMMON | {"yarn": _YARN, "llama3": _LLAMA3}.get(kind, set())
    for key, value in parameters.items():
        if key not in known and value is not None:
            f.refuse(f"rope_parameters.{key}", value, f"not known for rope_type {kind!r}")
    fields = {"rope_base": float(base), "rotary_dim": None if width == head_dim else width}
    return fields | {"rope_scaling": _scaling(f, kind, parameters)}


def _scaling(f: Fields, kind: str, parameters: dict[str, Any]) -> RopeScaling | None:
    factor = float(parameters.get("factor") or 1.0)
    length = parameters.get("original_max_position_embeddings") or f.get("max_position_embeddings", 2048)
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(factor=factor)
    if kind == "llama3":
        low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
        return Llama3Rope(factor=factor, original_length=length, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        gain = parameters.get("attention_factor")
        if gain is None and parameters.get("mscale") and parameters.get("mscale_all_dim"):
            gain = _mscale(factor, parameters["mscale"]) / _mscale(factor, parameters["mscale_all_dim"])
        return YarnRope(
            factor=factor,
            original_length=length,
            beta_fast=float(parameters.get("beta_fast") or 32.0),
            beta_slow=float(parameters.get("beta_slow") or 1.0),
            attention_gain=None if gain is None else float(gain),
            truncate=parameters.get("truncate", True),
        )
    f.refuse("rope_parameters.rope_type", kind, "only 'default', 'linear', 'llama3' or 'yarn' can be expressed")
    return None


def yarn_scale(f: Fields, scale: float) -> float | None:
    """DeepSeek's factor on the scores under stretched positions; None where it is `scale` itself."""
    parameters = f.get("rope_parameters") or f.get("rope_scaling") or {}
    kind, all_dim = parameters.get("rope_type", parameters.get("type", "default")), parameters.get("mscale_all_dim")
    if kind == "default" or not all_dim:
        return None
    return scale * _mscale(float(parameters["factor"]), all_dim) ** 2


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def write_rope(a: Attention | LatentAttention, width: int | None = None) -> dict[str, Any]:
    """`rope_parameters`; nothing where the model has no positions.

    Args:
        a: the attention.
        width: channels that can be rotated, all of which are; None means a head's, of which `rotary_dim` are.
    """
    if a.rope_base is None:
        return {}
    scaling = a.rope_scaling
    fields: dict[str, Any] = {"rope_theta": a.rope_base, "rope_type": "default"}
    if width is None and a.rotary_dim is not None:
        fields["partial_rotary_factor"] = a.rotary_dim / a.head_dim
    if scaling is not None:
        fields |= {
            "rope_type": {LinearRope: "linear", Llama3Rope: "llama3", YarnRope: "yarn"}[type(scaling)],
            "factor": scaling.factor,
        }
    if isinstance(scaling, Llama3Rope | YarnRope):
        fields["original_max_position_embeddings"] = scaling.original_length
    if isinstance(scaling, Llama3Rope):
        fields |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if isinstance(scaling, YarnRope):
        fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        if scaling.attention_gain is not None:
            fields["attention_factor"] = scaling.attention_gain
        if isinstance(a, LatentAttention) and a.scale is not None:
            ratio = (a.scale * (a.key_dim + a.rotary_dim) ** 0.5) ** 0.5
            fields["mscale_all_dim"] = (ratio - 1.0) / (0.1 * math.log(scaling.factor))
    return {"rope_parameters": fields}
