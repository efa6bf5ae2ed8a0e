"""RecurrentGemma (Griffin, arXiv 2402.19427): RG-LRU blocks and attention in a window, gated GELU behind each."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from mlt.export.huggingface.architecture import Architecture, every, first, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, depthwise_conv, linear, vector
from mlt.export.huggingface.parts import (
    attention_links,
    mixer_at,
    model_links,
    read_attention,
    read_model,
    swiglu_links,
    write_attention,
    write_model,
)
from mlt.export.huggingface.rope import read_rope
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.rg_lru import RGLRU
from mlt.model.block import Block
from mlt.model.lm import LMConfig

_GELU = "gelu_pytorch_tanh"


def read(f: Fields) -> LMConfig:
    eps, count, d = f.get("rms_norm_eps", 1e-6), f.need("num_hidden_layers"), f.need("hidden_size")
    f.only("hidden_activation", _GELU, default=_GELU)
    f.get("w_init_variance_scale"), f.get("final_w_init_variance_scale"), f.get("layers_block_type"), f.get("layer_types")
    heads = f.need("num_attention_heads")
    f.only("head_dim", d // heads, default=d // heads)
    rope = read_rope(f, d // heads, partial=0.5)
    if rope["rope_scaling"] is not None:
        f.refuse("rope_parameters.rope_type", f.get("rope_parameters")["rope_type"], "transformers itself refuses it")
    window = f.get("attention_window_size", 2048)
    recurrent = RGLRU(num_heads=heads, width=f.get("lru_width", d), conv_width=f.get("conv1d_width", 4))
    # A bias on the output projection alone is there in any case.
    attention = read_attention(f, output_bias=True, window=window, **rope)
    # The file counts both halves of the gated layer.
    dense = SwiGLU(d_ff=f.need("intermediate_size") // 2, activation="gelu_tanh", bias=True)
    types = f.get("block_types", ["recurrent", "recurrent", "attention"])
    mixers = {"recurrent": recurrent, "attention": attention}
    for kind in sorted(set(types) - set(mixers)):
        f.refuse("block_types", kind, f"only {' or '.join(mixers)} can be expressed")
    layers = [mixers.get(types[layer % len(types)], recurrent) for layer in range(count)]
    norm = {"norm_eps": eps, "unit_offset_norm": True}
    blocks = [Block(mixers=(mixer, dense), **norm) for mixer in layers]
    cap = f.get("logits_soft_cap", 30.0)
    model = read_model(f, tie_embeddings=f.get("tie_word_embeddings", True))
    return LMConfig(**model, stack=stack_of(blocks), embed_scale=_embed_scale(d), logit_softcap=float(cap), **norm)


def _embed_scale(d: int) -> float:
    """The root of the width, rounded to bfloat16 as published."""
    return float(jnp.asarray(d**0.5, jnp.bfloat16))


def write(config: LMConfig) -> dict[str, Any]:
    layers = config.stack.layers()
    mixers = [mixer_at(block, 0, Attention, RGLRU) for block in layers]
    recurrent, dense = first(layers, RGLRU), mixer_at(layers[0], 1, SwiGLU)
    types = ["attention" if isinstance(mixer, Attention) else "recurrent" for mixer in mixers]
    fields: dict[str, Any] = write_model(config)
    for attention in every(layers, Attention)[:1]:
        fields |= {**write_attention(attention), "attention_window_size": attention.window}
    return fields | {
        "block_types": types[: _repeat(types)],
        "num_attention_heads": recurrent.num_heads,
        "lru_width": recurrent.channels(config.d_model),
        "conv1d_width": recurrent.conv_width,
        "intermediate_size": 2 * dense.d_ff,
        "hidden_activation": _GELU,
        "logits_soft_cap": config.logit_softcap,
        "rms_norm_eps": config.norm_eps,
    }


def _repeat(kinds: Sequence[str]) -> int:
    """The length of the shortest start that gives all of them when repeated."""
    return next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config, norm="final_norm")
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.", f"model.layers.{number}."
        mixer, dense = block.mixers
        yield vector(f"{ours}0.norm.scale", f"{theirs}temporal_pre_norm.weight", d)
        if isinstance(mixer, Attention):
            yield from attention_links(mixer, d, f"{ours}0.mixer.", f"{theirs}temporal_block.")
        else:
            yield from _recurrent_links(mixer, d, f"{ours}0.mixer.", f"{theirs}temporal_block.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}channel_pre_norm.weight", d)
        yield from swiglu_links(dense.d_ff, d, f"{ours}1.mixer.", f"{theirs}mlp_block.", bias=True)


def _recurrent_links(m: RGLRU, d: int, ours: str, theirs: str) -> Iterator[Link]:
    width = m.channels(d)
    block = width // m.num_heads
    for mine, other, shape in (("gate", "y", (width, d)), ("value", "x", (width, d)), ("output", "out", (d, width))):
        yield linear(f"{ours}{mine}.kernel", f"{theirs}linear_{other}.weight", *shape)
        yield vector(f"{ours}{mine}.bias", f"{theirs}linear_{other}.bias", shape[0])
    yield depthwise_conv(f"{theirs}conv_1d.weight", m.conv_width, ((f"{ours}conv.kernel", width),))
    yield vector(f"{ours}conv.bias", f"{theirs}conv_1d.bias", width)
    for mine, other in (("forget", "recurrent"), ("write", "input")):
        yield vector(f"{ours}{mine}", f"{theirs}rg_lru.{other}_gate_weight", m.num_heads, block, block)
        yield vector(f"{ours}{mine}_bias", f"{theirs}rg_lru.{other}_gate_bias", m.num_heads, block)
    yield vector(f"{ours}decay", f"{theirs}rg_lru.recurrent_param", width)


ARCHITECTURE = Architecture("recurrent_gemma", "RecurrentGemmaForCausalLM", read, write, links)
