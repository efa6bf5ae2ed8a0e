"""Llama (arXiv 2302.13971): grouped-query attention and SwiGLU."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, vector
from mlt.export.huggingface.parts import (
    attention_links,
    mixer_at,
    model_links,
    read_attention,
    read_model,
    swiglu_links,
    swiglu_width,
    write_attention,
    write_model,
)
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig


def read(f: Fields) -> LMConfig:
    eps = f.get("rms_norm_eps", 1e-6)
    block = Block(mixers=(read_attention(f), swiglu_width(f)), norm_eps=eps)
    return LMConfig(**read_model(f), stack=stack_of([block] * f.need("num_hidden_layers")), norm_eps=eps)


def write(config: LMConfig) -> dict[str, Any]:
    block = config.stack.layers()[0]
    dense = mixer_at(block, 1, SwiGLU)
    return {
        **write_model(config),
        **write_attention(mixer_at(block, 0, Attention)),
        "intermediate_size": dense.d_ff,
        "mlp_bias": dense.bias,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
    }


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config)
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.", f"model.layers.{number}."
        attention, dense = block.mixers
        yield vector(f"{ours}0.norm.scale", f"{theirs}input_layernorm.weight", d)
        yield from attention_links(attention, d, f"{ours}0.mixer.", f"{theirs}self_attn.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}post_attention_layernorm.weight", d)
        yield from swiglu_links(dense.d_ff, d, f"{ours}1.mixer.", f"{theirs}mlp.", bias=dense.bias)


ARCHITECTURE = Architecture("llama", "LlamaForCausalLM", read, write, links)
