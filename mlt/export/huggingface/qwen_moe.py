"""Experts as the Qwen models spell them: some layers dense, some routed, a gated shared expert in Qwen3-Next."""

from collections.abc import Iterator, Sequence
from typing import Any

from mlt.export.huggingface.architecture import Unfit
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, vector
from mlt.export.huggingface.parts import expert_links, swiglu_links
from mlt.mixers.base import MixerConfig
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU


def read_channel_mixers(f: Fields, count: int, *, renormalize: bool = False, shared: bool = False) -> list[MixerConfig]:
    """The feed-forward or the experts of each layer.

    Args:
        f: config.json.
        count: layers.
        renormalize: whether the chosen scores are divided by their sum where the file does not say.
        shared: whether there is a gated shared expert.
    """
    f.only("hidden_act", "silu", default="silu")
    number = f.get("num_local_experts") if f.get("num_experts") is None else f.get("num_experts")
    every, dense_layers = f.get("decoder_sparse_step", 1), f.get("mlp_only_layers", [])
    dense = SwiGLU(d_ff=f.need("intermediate_size"))
    if number == 0:
        return [dense] * count
    more = {}
    if shared:
        more = {"num_shared_experts": 1, "shared_d_ff": f.need("shared_expert_intermediate_size"), "shared_gate": True}
    experts = MoE(
        num_experts=number,
        num_experts_per_token=f.need("num_experts_per_tok"),
        d_ff=f.need("moe_intermediate_size"),
        router="softmax",
        renormalize=f.get("norm_topk_prob", renormalize),
        **more,
    )
    return [dense if layer in dense_layers or (layer + 1) % every else experts for layer in range(count)]


def moe_fields(mixers: Sequence[MixerConfig]) -> dict[str, Any]:
    """The fields of config.json that say the same.

    Raises:
        Unfit: a mixer is neither dense nor routed.
    """
    dense = [layer for layer, mixer in enumerate(mixers) if isinstance(mixer, SwiGLU)]
    routed = [mixer for mixer in mixers if isinstance(mixer, MoE)]
    if len(dense) + len(routed) != len(mixers):
        raise Unfit("a feed-forward is neither SwiGLU nor MoE")
    fields: dict[str, Any] = {"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": dense}
    width = next((mixer.d_ff for mixer in mixers if isinstance(mixer, SwiGLU)), routed[0].d_ff if routed else 0)
    if not routed:
        return {**fields, "num_experts": 0, "mlp_only_layers": [], "intermediate_size": width}
    experts = routed[0]
    if experts.shared_gate:
        fields["shared_expert_intermediate_size"] = experts.shared_width
    return fields | {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_token,
        "moe_intermediate_size": experts.d_ff,
        "norm_topk_prob": experts.renormalize,
        "intermediate_size": width,
    }


def moe_layer_links(mixer: MixerConfig, d: int, ours: str, theirs: str) -> Iterator[Link]:
    if isinstance(mixer, SwiGLU):
        yield from swiglu_links(mixer.d_ff, d, ours, theirs)
        return
    assert isinstance(mixer, MoE)
    yield from expert_links(mixer, d, ours, theirs)
    if mixer.num_shared_experts:
        yield from swiglu_links(mixer.shared_width, d, f"{ours}shared.", f"{theirs}shared_expert.")
    if mixer.shared_gate:
        yield vector(f"{ours}shared_gate", f"{theirs}shared_expert_gate.weight", 1, d)
