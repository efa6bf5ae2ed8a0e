"""Granite 4 (GraniteMoeHybrid): Mamba-2 and attention layers, experts beside a shared one, four multipliers."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, first, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, Part, fused_linear, linear, vector
from mlt.export.huggingface.parts import (
    attention_links,
    mamba2_links,
    mixer_at,
    model_links,
    read_attention,
    read_mamba2,
    read_model,
    write_attention,
    write_mamba2,
    write_model,
)
from mlt.export.huggingface.rope import read_rope
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.model.block import Block
from mlt.model.lm import LMConfig

_ATTENTION, _MAMBA = ("attention", "full_attention"), ("mamba", "linear_attention")


def read(f: Fields) -> LMConfig:
    eps, count = f.get("rms_norm_eps", 1e-6), f.need("num_hidden_layers")
    f.only("hidden_act", "silu", default="silu")
    kinds = f.get("layer_types", f.get("layers_block_type", ["mamba"] * count))
    f.get("layers_block_type")
    for kind in sorted(set(kinds) - {*_ATTENTION, *_MAMBA}):
        f.refuse("layer_types", kind, "only 'attention' or 'mamba' can be expressed")
    mixers = {}
    if set(kinds) & set(_ATTENTION):
        head_dim = f.get("head_dim", f.need("hidden_size") // f.need("num_attention_heads"))
        positions = f.only("position_embedding_type", "rope", "nope", default="nope")
        rope = read_rope(f, head_dim)
        rope = rope if positions == "rope" else {"rope_base": None}
        mixers |= dict.fromkeys(_ATTENTION, read_attention(f, scale=float(f.get("attention_multiplier", 1.0)), **rope))
    if set(kinds) & set(_MAMBA):
        mixers |= dict.fromkeys(_MAMBA, read_mamba2(f, norm_eps=eps))
    more = {"norm_eps": eps, "residual_scale": float(f.get("residual_multiplier", 1.0))}
    channel = _read_channel(f)
    blocks = [Block(mixers=(mixers.get(kind, channel), channel), **more) for kind in kinds]
    scales = {
        "embed_scale": float(f.get("embedding_multiplier", 1.0)),
        "logit_scale": 1.0 / f.get("logits_scaling", 1.0),
    }
    return LMConfig(**read_model(f), stack=stack_of(blocks), norm_eps=eps, **scales)


def _read_channel(f: Fields) -> MoE | SwiGLU:
    shared, number = f.get("shared_intermediate_size", 1024), f.get("num_local_experts", 8)
    chosen, width = f.get("num_experts_per_tok", 2), f.get("intermediate_size", 11008)
    if number == 0:
        return SwiGLU(d_ff=shared)
    # The softmax over the chosen logits is the softmax over all, divided by the sum of the chosen.
    return MoE(
        num_experts=number,
        num_experts_per_token=chosen,
        d_ff=width,
        num_shared_experts=1,
        shared_d_ff=shared,
        router="softmax",
    )


def write(config: LMConfig) -> dict[str, Any]:
    layers = config.stack.layers()
    mixers = [mixer_at(block, 0, Attention, Mamba2) for block in layers]
    channel = mixer_at(layers[0], 1, MoE, SwiGLU)
    mamba = first(layers, Mamba2)
    fields = {**write_model(config), **write_mamba2(mamba, config.d_model)}
    attention = next((mixer for mixer in mixers if isinstance(mixer, Attention)), None)
    if attention is not None:
        scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
        positions = "nope" if attention.rope_base is None else "rope"
        fields |= {**write_attention(attention), "attention_multiplier": scale, "position_embedding_type": positions}
    else:
        # Read by transformers all the same.
        fields |= {"num_attention_heads": mamba.num_heads, "position_embedding_type": "nope"}
    if isinstance(channel, MoE):
        fields |= {"num_local_experts": channel.num_experts, "num_experts_per_tok": channel.num_experts_per_token}
        fields |= {"intermediate_size": channel.d_ff, "shared_intermediate_size": channel.shared_width}
    else:
        fields |= {"num_local_experts": 0, "shared_intermediate_size": channel.d_ff}
    return fields | {
        "layer_types": ["attention" if isinstance(mixer, Attention) else "mamba" for mixer in mixers],
        "residual_multiplier": layers[0].residual_scale,
        "embedding_multiplier": config.embed_scale,
        "logits_scaling": 1.0 / config.logit_scale,
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
        if isinstance(mixer, Attention):
            yield from attention_links(mixer, d, f"{ours}0.mixer.", f"{theirs}self_attn.")
        else:
            yield from mamba2_links(mixer, d, f"{ours}0.mixer.", f"{theirs}mamba.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}post_attention_layernorm.weight", d)
        if isinstance(channel, MoE):
            yield from _expert_links(channel, d, f"{ours}1.mixer.", f"{theirs}block_sparse_moe.")
            yield from _dense_links(channel.shared_width, d, f"{ours}1.mixer.shared.", f"{theirs}shared_mlp.")
        else:
            yield from _dense_links(channel.d_ff, d, f"{ours}1.mixer.", f"{theirs}shared_mlp.")


def _dense_links(d_ff: int, d: int, ours: str, theirs: str) -> Iterator[Link]:
    yield fused_linear(f"{theirs}input_linear.weight", d, ((f"{ours}gate.kernel", d_ff), (f"{ours}up.kernel", d_ff)))
    yield linear(f"{ours}down.kernel", f"{theirs}output_linear.weight", d, d_ff)


def _expert_links(m: MoE, d: int, ours: str, theirs: str) -> Iterator[Link]:
    """One tensor for all experts: (experts, gate and up, embed) and (experts, embed, ffn)."""
    yield linear(f"{ours}router", f"{theirs}router.layer.weight", m.num_experts, d)
    parts = (Part(f"{ours}gate", m.d_ff, (0, 2, 1)), Part(f"{ours}up", m.d_ff, (0, 2, 1)))
    yield Link((f"{theirs}input_linear.weight",), (m.num_experts, 2 * m.d_ff, d), parts, axis=1)
    down = (Part(f"{ours}down", m.num_experts, (0, 2, 1)),)
    yield Link((f"{theirs}output_linear.weight",), (m.num_experts, d, m.d_ff), down)


ARCHITECTURE = Architecture("granitemoehybrid", "GraniteMoeHybridForCausalLM", read, write, links)
