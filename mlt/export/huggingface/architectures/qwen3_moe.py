"""Qwen3-MoE (arXiv 2505.09388): Qwen3 attention, experts in all or some layers."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, first, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, vector
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
from mlt.mixers.channel.moe import MoE
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig


def read(f: Fields) -> LMConfig:
    eps, count = f.get("rms_norm_eps", 1e-6), f.need("num_hidden_layers")
    window = f.get("sliding_window", 4096) if f.get("use_sliding_window", False) else None
    f.get("sliding_window")
    attention = read_attention(f, qk_norm=True, norm_eps=eps, window=window)
    channel = read_channel_mixers(f, count)
    blocks = [Block(mixers=(attention, mixer), norm_eps=eps) for mixer in channel]
    return LMConfig(**read_model(f), stack=stack_of(blocks), norm_eps=eps)


def write(config: LMConfig) -> dict[str, Any]:
    layers = config.stack.layers()
    first(layers, MoE)
    attention = mixer_at(layers[0], 0, Attention)
    return {
        **write_model(config),
        **write_attention(attention),
        **moe_fields([block.mixers[-1] for block in layers]),
        "use_sliding_window": attention.window is not None,
        "sliding_window": attention.window,
        "rms_norm_eps": config.norm_eps,
    }


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config)
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.", f"model.layers.{number}."
        attention, channel = block.mixers
        yield vector(f"{ours}0.norm.scale", f"{theirs}input_layernorm.weight", d)
        yield from attention_links(attention, d, f"{ours}0.mixer.", f"{theirs}self_attn.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}post_attention_layernorm.weight", d)
        yield from moe_layer_links(channel, d, f"{ours}1.mixer.", f"{theirs}mlp.")


ARCHITECTURE = Architecture("qwen3_moe", "Qwen3MoeForCausalLM", read, write, links)
