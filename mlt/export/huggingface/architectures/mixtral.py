"""Mixtral (arXiv 2401.04088): Llama with experts in place of every feed-forward."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, vector
from mlt.export.huggingface.parts import (
    attention_links,
    expert_links,
    mixer_at,
    model_links,
    read_attention,
    read_model,
    write_attention,
    write_model,
)
from mlt.mixers.channel.moe import MoE
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig


def read(f: Fields) -> LMConfig:
    eps = f.get("rms_norm_eps", 1e-5)
    f.only("hidden_act", "silu", default="silu")
    attention = read_attention(f, window=f.get("sliding_window"))
    experts = MoE(
        num_experts=f.get("num_local_experts", 8),
        num_experts_per_token=f.get("num_experts_per_tok", 2),
        d_ff=f.need("intermediate_size"),
        router="softmax",
    )
    block = Block(mixers=(attention, experts), norm_eps=eps)
    return LMConfig(**read_model(f), stack=stack_of([block] * f.need("num_hidden_layers")), norm_eps=eps)


def write(config: LMConfig) -> dict[str, Any]:
    block = config.stack.layers()[0]
    attention, experts = mixer_at(block, 0, Attention), mixer_at(block, 1, MoE)
    fields = {
        **write_model(config),
        **write_attention(attention),
        "sliding_window": attention.window,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_token,
        "intermediate_size": experts.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
    }
    return {name: value for name, value in fields.items() if name != "attention_bias" or value}


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config)
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.", f"model.layers.{number}."
        attention, experts = block.mixers
        yield vector(f"{ours}0.norm.scale", f"{theirs}input_layernorm.weight", d)
        yield from attention_links(attention, d, f"{ours}0.mixer.", f"{theirs}self_attn.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}post_attention_layernorm.weight", d)
        yield from expert_links(experts, d, f"{ours}1.mixer.", f"{theirs}block_sparse_moe.", names=("w1", "w3", "w2"))


ARCHITECTURE = Architecture("mixtral", "MixtralForCausalLM", read, write, links)
