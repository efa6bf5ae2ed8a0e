"""Kimi Linear (arXiv 2510.26692): KDA layers, latent attention without positions, experts as in DeepSeek-V3."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, every, first, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.latent import deepseek_channel_links, latent_attention_links
from mlt.export.huggingface.links import Link, depthwise_conv, linear, vector
from mlt.export.huggingface.parts import mixer_at, model_links, read_model, write_model
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.kimi_delta import KimiDelta
from mlt.mixers.sequence.latent_attention import LatentAttention
from mlt.model.block import Block
from mlt.model.lm import LMConfig

_LATENT_EPS = 1e-6  # of the norm on the latent, whatever rms_norm_eps says


def read(f: Fields) -> LMConfig:
    eps, count = f.get("rms_norm_eps", 1e-5), f.need("num_hidden_layers")
    f.only("hidden_act", "silu", default="silu")
    linear = f.get("linear_attn_config", {})
    dim, heads = f.get("linear_head_dim", 128), f.get("linear_num_heads", 32)
    width = f.get("linear_conv_kernel_dim", 4)
    delta = KimiDelta(
        num_heads=linear.get("num_heads", heads),
        key_dim=linear.get("head_dim", dim),
        conv_width=linear.get("short_conv_kernel_size", width),
        gate_bias=False,
        norm_eps=eps,
    )
    attention, routed, dense = _read_attention(f), _read_experts(f), SwiGLU(d_ff=f.need("intermediate_size"))
    blocks = []
    for mixer, channel in zip(_kinds(f, count, linear), _channels(f, count), strict=True):
        chosen = attention if mixer == "full_attention" else delta
        blocks.append(Block(mixers=(chosen, dense if channel == "dense" else routed), norm_eps=eps))
    return LMConfig(**read_model(f), stack=stack_of(blocks), norm_eps=eps)


def _kinds(f: Fields, count: int, linear: dict[str, Any]) -> list[str]:
    """What each layer mixes with; released files count the attention layers from 1."""
    if given := f.get("layer_types"):
        return given
    if "full_attn_layers" in linear:
        return ["full_attention" if layer + 1 in linear["full_attn_layers"] else "linear_attention" for layer in range(count)]
    return ["full_attention" if layer and layer % 4 == 0 else "linear_attention" for layer in range(count)]


def _channels(f: Fields, count: int) -> list[str]:
    dense = f.get("first_k_dense_replace", 1)
    return f.get("mlp_layer_types") or ["dense" if layer < dense else "sparse" for layer in range(count)]


def _read_attention(f: Fields) -> LatentAttention:
    f.only("attention_bias", False, default=False)
    f.only("mla_use_nope", True, default=True)
    f.get("qk_head_dim"), f.get("head_dim"), f.get("model_max_length"), f.get("num_nextn_predict_layers")
    f.get("rope_theta"), f.get("rope_scaling"), f.get("rope_parameters")  # there are no positions
    heads = f.need("num_attention_heads")
    f.only("num_key_value_heads", heads, default=heads)
    return LatentAttention(
        num_heads=heads,
        key_dim=f.get("qk_nope_head_dim", 128),
        rotary_dim=f.get("qk_rope_head_dim", 64),
        value_dim=f.get("v_head_dim", 128),
        kv_rank=f.get("kv_lora_rank", 512),
        query_rank=f.get("q_lora_rank"),
        rope_base=None,
        norm_eps=_LATENT_EPS,
    )


def _read_experts(f: Fields) -> MoE:
    f.only("moe_router_activation_func", "sigmoid", default="sigmoid")
    f.only("moe_layer_freq", 1, default=1)
    f.get("use_grouped_topk")
    return MoE(
        num_experts=f.get("num_experts", 256),
        num_experts_per_token=f.get("num_experts_per_token", 8),
        d_ff=f.need("moe_intermediate_size"),
        num_shared_experts=f.get("num_shared_experts", 1),
        renormalize=f.get("moe_renormalize", True),
        routed_scale=float(f.get("routed_scaling_factor", 2.446)),
        num_groups=f.get("num_expert_group", 1),
        groups_per_token=f.get("topk_group", 1),
    )


def write(config: LMConfig) -> dict[str, Any]:
    layers = config.stack.layers()
    delta, attention, experts = first(layers, KimiDelta), first(layers, LatentAttention), first(layers, MoE)
    mixers, dense = [mixer_at(block, 0, KimiDelta, LatentAttention) for block in layers], every(layers, SwiGLU)
    return {
        **write_model(config),
        "layer_types": ["full_attention" if isinstance(mixer, LatentAttention) else "linear_attention" for mixer in mixers],
        "mlp_layer_types": ["dense" if isinstance(block.mixers[1], SwiGLU) else "sparse" for block in layers],
        "linear_num_heads": delta.num_heads,
        "linear_head_dim": delta.key_dim,
        "linear_conv_kernel_dim": delta.conv_width,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "qk_nope_head_dim": attention.key_dim,
        "qk_rope_head_dim": attention.rotary_dim,
        "v_head_dim": attention.values,
        "kv_lora_rank": attention.kv_rank,
        "q_lora_rank": attention.query_rank,
        "num_experts": experts.num_experts,
        "num_experts_per_token": experts.num_experts_per_token,
        "moe_intermediate_size": experts.d_ff,
        "num_shared_experts": experts.num_shared_experts,
        "moe_renormalize": experts.renormalize,
        "routed_scaling_factor": experts.routed_scale,
        "num_expert_group": experts.num_groups,
        "topk_group": experts.groups_per_token,
        "intermediate_size": dense[0].d_ff if dense else experts.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
    }


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config)
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.", f"model.layers.{number}."
        mixer, channel = block.mixers
        yield vector(f"{ours}0.norm.scale", f"{theirs}input_layernorm.weight", d)
        if isinstance(mixer, LatentAttention):
            yield from latent_attention_links(mixer, d, f"{ours}0.mixer.", f"{theirs}self_attn.", paired=False)
        else:
            yield from _delta_links(mixer, d, f"{ours}0.mixer.", f"{theirs}self_attn.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}post_attention_layernorm.weight", d)
        names, experts = ("w1", "w3", "w2"), f"{theirs}block_sparse_moe."
        yield from deepseek_channel_links(channel, d, f"{ours}1.mixer.", f"{theirs}mlp.", experts=experts, names=names)


def _delta_links(m: KimiDelta, d: int, ours: str, theirs: str) -> Iterator[Link]:
    keys, values = m.num_heads * m.key_dim, m.num_heads * m.values
    for mine, other, size in (("query", "q", keys), ("key", "k", keys), ("value", "v", values)):
        yield linear(f"{ours}{mine}.kernel", f"{theirs}{other}_proj.weight", size, d)
        yield depthwise_conv(f"{theirs}{other}_conv1d.weight", m.conv_width, ((f"{ours}{mine}_conv.kernel", size),))
    yield linear(f"{ours}beta.kernel", f"{theirs}b_proj.weight", m.num_heads, d)
    for mine, other, size in (("decay", "f", keys), ("gate", "g", values)):
        yield linear(f"{ours}{mine}_in.kernel", f"{theirs}{other}_a_proj.weight", m.values, d)
        yield linear(f"{ours}{mine}_out.kernel", f"{theirs}{other}_b_proj.weight", size, m.values)
    yield vector(f"{ours}A_log", f"{theirs}A_log", 1, 1, m.num_heads, 1)
    yield vector(f"{ours}dt_bias", f"{theirs}dt_bias", keys)
    yield vector(f"{ours}norm.scale", f"{theirs}o_norm.weight", m.values)
    yield linear(f"{ours}output.kernel", f"{theirs}o_proj.weight", d, values)


# transformers 5.24 saves dense feed-forwards under the experts' name; released files do not.
SPELLINGS = ((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),)
ARCHITECTURE = Architecture("kimi_linear", "KimiLinearForCausalLM", read, write, links, SPELLINGS)
