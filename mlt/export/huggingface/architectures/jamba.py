"""Jamba (arXiv 2403.19887): Mamba with an attention layer without positions here and there, experts in every other layer."""

from collections.abc import Iterator, Sequence
from typing import Any

from mlt.export.huggingface.architecture import Architecture, every, first, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, vector
from mlt.export.huggingface.parts import (
    attention_links,
    expert_links,
    mixer_at,
    model_links,
    read_attention,
    read_model,
    swiglu_links,
    write_attention,
    write_model,
)
from mlt.export.huggingface.selective import mamba_links, rank_of
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba import Mamba
from mlt.model.block import Block
from mlt.model.lm import LMConfig


def read(f: Fields) -> LMConfig:
    eps, count, d = f.get("rms_norm_eps", 1e-6), f.need("num_hidden_layers"), f.need("hidden_size")
    f.only("hidden_act", "silu", default="silu")
    f.only("attention_bias", False, default=False)
    f.only("sliding_window", None, default=None)
    f.only("mamba_proj_bias", False, default=False)
    f.only("mamba_inner_layernorms", True, default=True)
    f.get("use_mambapy"), f.get("use_associative_scan")
    attention = read_attention(f, rope_base=None, qkv_bias=False, output_bias=False)
    mamba = Mamba(
        inner=int(f.get("mamba_expand", 2) * d),
        state_dim=f.get("mamba_d_state", 16),
        step_rank=rank_of(f.get("mamba_dt_rank", "auto")),
        conv_width=f.get("mamba_d_conv", 4),
        conv_bias=f.get("mamba_conv_bias", True),
        inner_norm=True,
        norm_eps=eps,
    )
    dense = SwiGLU(d_ff=f.need("intermediate_size"))
    # Chosen by the softmax over all experts, whose probabilities are not divided by their sum.
    number = f.get("num_experts", f.get("num_local_experts", 16))
    experts = MoE(
        num_experts=number,
        num_experts_per_token=f.get("num_experts_per_tok", 2),
        d_ff=dense.d_ff,
        router="softmax",
        renormalize=False,
    )
    attends = _at(f.get("attn_layer_period", 8), f.get("attn_layer_offset", 4), count)
    routes = _at(f.get("expert_layer_period", 2), f.get("expert_layer_offset", 1), count)
    f.get("layers_block_type"), f.get("layers_num_experts")
    blocks = []
    for layer in range(count):
        mixers = (attention if layer in attends else mamba, experts if layer in routes and number > 1 else dense)
        blocks.append(Block(mixers=mixers, norm_eps=eps))
    return LMConfig(**read_model(f), stack=stack_of(blocks), norm_eps=eps)


def write(config: LMConfig) -> dict[str, Any]:
    d, layers = config.d_model, config.stack.layers()
    mamba, experts = first(layers, Mamba), every(layers, MoE)
    attends = [number for number, block in enumerate(layers) if isinstance(mixer_at(block, 0, Attention, Mamba), Attention)]
    routes = [number for number, block in enumerate(layers) if isinstance(mixer_at(block, 1, SwiGLU, MoE), MoE)]
    inner = mamba.channels(d)
    # A model without attention has a number of heads all the same.
    attention = [write_attention(mixer) for mixer in every(layers, Attention)[:1]] or [{"num_attention_heads": 1}]
    fields = write_model(config) | {name: value for name, value in attention[0].items() if name != "attention_bias"}
    period, offset = _period(attends, len(layers))
    fields |= {"attn_layer_period": period, "attn_layer_offset": offset}
    period, offset = _period(routes, len(layers))
    return fields | {
        "expert_layer_period": period,
        "expert_layer_offset": offset,
        "num_experts": experts[0].num_experts if experts else 1,
        "num_experts_per_tok": experts[0].num_experts_per_token if experts else 1,
        "intermediate_size": mixer_at(layers[0], 1, SwiGLU, MoE).d_ff,
        "hidden_act": "silu",
        "mamba_expand": inner // d if inner % d == 0 else inner / d,
        "mamba_d_state": mamba.state_dim,
        "mamba_dt_rank": mamba.rank(d),
        "mamba_d_conv": mamba.conv_width,
        "mamba_conv_bias": mamba.conv_bias,
        "rms_norm_eps": config.norm_eps,
    }


def _at(period: int, offset: int, count: int) -> list[int]:
    return [layer for layer in range(count) if layer % period == offset]


def _period(layers: Sequence[int], count: int) -> tuple[int, int]:
    """A period and an offset that give these layers; some that do not, where none do."""
    if not layers:
        return count + 1, count
    start = layers[0]
    if len(layers) == 1:
        return max(start + 1, count - start), start
    return layers[1] - start, start


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config, norm="final_layernorm")
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.", f"model.layers.{number}."
        mixer, channel = block.mixers
        yield vector(f"{ours}0.norm.scale", f"{theirs}input_layernorm.weight", d)
        if isinstance(mixer, Attention):
            yield from attention_links(mixer, d, f"{ours}0.mixer.", f"{theirs}self_attn.")
        else:
            yield from mamba_links(mixer, d, f"{ours}0.mixer.", f"{theirs}mamba.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}pre_ff_layernorm.weight", d)
        if isinstance(channel, MoE):
            yield from expert_links(channel, d, f"{ours}1.mixer.", f"{theirs}feed_forward.", router="router")
        else:
            yield from swiglu_links(channel.d_ff, d, f"{ours}1.mixer.", f"{theirs}feed_forward.")


ARCHITECTURE = Architecture("jamba", "JambaForCausalLM", read, write, links)
