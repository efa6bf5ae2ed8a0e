"""Qwen3-Next: three gated delta layers to one of gated attention, each with experts and a gated shared one."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, first, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, Part, depthwise_conv, linear, vector
from mlt.export.huggingface.parts import (
    attention_links,
    mixer_at,
    model_links,
    read_attention,
    read_model,
    write_attention,
    write_model,
)
from mlt.export.huggingface.qwen_moe import moe_fields, moe_layer_links, read_channel_mixers
from mlt.export.huggingface.rope import read_rope
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.model.block import Block
from mlt.model.lm import LMConfig


def read(f: Fields) -> LMConfig:
    eps, count = f.get("rms_norm_eps", 1e-6), f.need("num_hidden_layers")
    f.only("attention_bias", False, default=False)
    rope = read_rope(f, f.get("head_dim", 256), partial=0.25)
    attention = read_attention(f, qk_norm=True, norm_eps=eps, unit_offset_norm=True, output_gate=True, **rope)
    delta = GatedDelta(
        num_heads=f.need("linear_num_value_heads"),
        num_key_heads=f.need("linear_num_key_heads"),
        key_dim=f.need("linear_key_head_dim"),
        value_dim=f.need("linear_value_head_dim"),
        conv_width=f.get("linear_conv_kernel_dim", 4),
        norm_eps=eps,
    )
    every = f.get("full_attention_interval", 4)
    kinds = f.get("layer_types", ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(count)])
    for kind in sorted(set(kinds) - {"full_attention", "linear_attention"}):
        f.refuse("layer_types", kind, "only 'full_attention' or 'linear_attention' can be expressed")
    mixers = [attention if kind == "full_attention" else delta for kind in kinds]
    channel = read_channel_mixers(f, count, renormalize=True, shared=True)
    blocks = [Block(mixers=pair, norm_eps=eps, unit_offset_norm=True) for pair in zip(mixers, channel, strict=True)]
    return LMConfig(**read_model(f), stack=stack_of(blocks), norm_eps=eps, unit_offset_norm=True)


def write(config: LMConfig) -> dict[str, Any]:
    layers = config.stack.layers()
    delta = first(layers, GatedDelta)
    mixers = [mixer_at(block, 0, Attention, GatedDelta) for block in layers]
    return {
        **write_model(config),
        **write_attention(first(layers, Attention)),
        **moe_fields([block.mixers[-1] for block in layers]),
        "linear_num_value_heads": delta.num_heads,
        "linear_num_key_heads": delta.key_heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.values,
        "linear_conv_kernel_dim": delta.conv_width,
        "layer_types": ["full_attention" if isinstance(mixer, Attention) else "linear_attention" for mixer in mixers],
        "rms_norm_eps": config.norm_eps,
    }


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config)
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.", f"model.layers.{number}."
        mixer, channel = block.mixers
        yield vector(f"{ours}0.norm.scale", f"{theirs}input_layernorm.weight", d)
        if isinstance(mixer, Attention):
            yield from attention_links(mixer, d, f"{ours}0.mixer.", f"{theirs}self_attn.")
        else:
            yield from _delta_links(mixer, d, f"{ours}0.mixer.", f"{theirs}linear_attn.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}post_attention_layernorm.weight", d)
        yield from moe_layer_links(channel, d, f"{ours}1.mixer.", f"{theirs}mlp.")


def _delta_links(m: GatedDelta, d: int, ours: str, theirs: str) -> Iterator[Link]:
    """Both fused projections go key head by key head: q, k, then the values and gates of its value heads."""
    groups, each = m.key_heads, m.num_heads // m.key_heads
    sizes = (("query", m.key_dim), ("key", m.key_dim), ("value", each * m.values), ("gate", each * m.values))
    parts = tuple(Part(f"{ours}{name}.kernel", size, (2, 0, 1)) for name, size in sizes)
    rows = sum(size for _, size in sizes)
    yield Link((f"{theirs}in_proj_qkvz.weight",), (groups * rows, d), parts, (groups, rows, d), axis=1)
    parts = tuple(Part(f"{ours}{name}.kernel", each, (2, 0, 1)) for name in ("beta", "decay"))
    yield Link((f"{theirs}in_proj_ba.weight",), (2 * m.num_heads, d), parts, (groups, 2 * each, d), axis=1)
    convs = (("query_conv", groups * m.key_dim), ("key_conv", groups * m.key_dim), ("value_conv", m.num_heads * m.values))
    yield depthwise_conv(f"{theirs}conv1d.weight", m.conv_width, ((f"{ours}{name}.kernel", size) for name, size in convs))
    yield vector(f"{ours}A_log", f"{theirs}A_log", m.num_heads)
    yield vector(f"{ours}dt_bias", f"{theirs}dt_bias", m.num_heads)
    yield vector(f"{ours}norm.scale", f"{theirs}norm.weight", m.values)
    yield linear(f"{ours}output.kernel", f"{theirs}out_proj.weight", d, m.num_heads * m.values)


ARCHITECTURE = Architecture("qwen3_next", "Qwen3NextForCausalLM", read, write, links)
