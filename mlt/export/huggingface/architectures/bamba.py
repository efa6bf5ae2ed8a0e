"""Bamba: Mamba-2 with an attention layer here and there, SwiGLU behind each."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, first, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, vector
from mlt.export.huggingface.parts import (
    attention_links,
    mamba2_links,
    mixer_at,
    model_links,
    read_attention,
    read_mamba2,
    read_model,
    swiglu_links,
    swiglu_width,
    write_attention,
    write_mamba2,
    write_model,
)
from mlt.export.huggingface.rope import read_rope
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.model.block import Block
from mlt.model.lm import LMConfig


def read(f: Fields) -> LMConfig:
    eps, count = f.get("rms_norm_eps", 1e-5), f.need("num_hidden_layers")
    head_dim = f.need("hidden_size") // f.need("num_attention_heads")
    attention = read_attention(f, **read_rope(f, head_dim, partial=0.5))
    mamba, dense = read_mamba2(f, norm_eps=eps), swiglu_width(f)
    chosen = f.get("attn_layer_indices", [])
    f.get("layers_block_type"), f.get("layer_types")
    blocks = [Block(mixers=(attention if layer in chosen else mamba, dense), norm_eps=eps) for layer in range(count)]
    return LMConfig(**read_model(f), stack=stack_of(blocks), norm_eps=eps)


def write(config: LMConfig) -> dict[str, Any]:
    layers = config.stack.layers()
    mixers, dense = [mixer_at(block, 0, Attention, Mamba2) for block in layers], mixer_at(layers[0], 1, SwiGLU)
    return {
        **write_model(config),
        **write_attention(first(layers, Attention)),
        **write_mamba2(first(layers, Mamba2), config.d_model),
        "attn_layer_indices": [layer for layer, mixer in enumerate(mixers) if isinstance(mixer, Attention)],
        "intermediate_size": dense.d_ff,
        "mlp_bias": dense.bias,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
    }


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config, norm="final_layernorm")
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.", f"model.layers.{number}."
        mixer, dense = block.mixers
        yield vector(f"{ours}0.norm.scale", f"{theirs}input_layernorm.weight", d)
        if isinstance(mixer, Attention):
            yield from attention_links(mixer, d, f"{ours}0.mixer.", f"{theirs}self_attn.")
        else:
            yield from mamba2_links(mixer, d, f"{ours}0.mixer.", f"{theirs}mamba.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}pre_ff_layernorm.weight", d)
        yield from swiglu_links(dense.d_ff, d, f"{ours}1.mixer.", f"{theirs}feed_forward.", bias=dense.bias)


ARCHITECTURE = Architecture("bamba", "BambaForCausalLM", read, write, links)
