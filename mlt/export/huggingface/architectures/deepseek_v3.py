"""DeepSeek-V3 (arXiv 2412.19437): latent attention, dense layers first, then experts chosen by score and bias."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, every, first, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.latent import deepseek_channel_links, latent_attention_links
from mlt.export.huggingface.links import Link, vector
from mlt.export.huggingface.parts import mixer_at, model_links, read_model, write_model
from mlt.export.huggingface.rope import read_rope, write_rope, yarn_scale
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.latent_attention import LatentAttention
from mlt.model.block import Block
from mlt.model.lm import LMConfig

_LATENT_EPS = 1e-6  # of the norms on latents, whatever rms_norm_eps says


def read(f: Fields) -> LMConfig:
    eps, count = f.get("rms_norm_eps", 1e-6), f.need("num_hidden_layers")
    f.only("hidden_act", "silu", default="silu")
    f.only("attention_bias", False, default=False)
    f.only("rope_interleave", True, default=True)
    heads, nope, rotary = f.need("num_attention_heads"), f.get("qk_nope_head_dim", 128), f.get("qk_rope_head_dim", 64)
    f.only("num_key_value_heads", heads, default=heads)
    # Widths that follow from these two, and the extra prediction layers that transformers does not run.
    f.get("qk_head_dim"), f.get("head_dim"), f.get("num_mtp_layers"), f.get("num_nextn_predict_layers")
    rope = read_rope(f, rotary)
    attention = LatentAttention(
        num_heads=heads,
        key_dim=nope,
        rotary_dim=rotary,
        value_dim=f.get("v_head_dim", 128),
        kv_rank=f.get("kv_lora_rank", 512),
        query_rank=f.get("q_lora_rank"),
        rope_base=rope["rope_base"],
        rope_scaling=rope["rope_scaling"],
        scale=yarn_scale(f, (nope + rotary) ** -0.5),
        norm_eps=_LATENT_EPS,
    )
    routed, dense, dense_width = _read_experts(f), f.get("first_k_dense_replace", 3), f.need("intermediate_size")
    channel = [SwiGLU(d_ff=dense_width)] * min(dense, count) + [routed] * (count - dense)
    blocks = [Block(mixers=(attention, mixer), norm_eps=eps) for mixer in channel]
    return LMConfig(**read_model(f), stack=stack_of(blocks), norm_eps=eps)


def _read_experts(f: Fields) -> MoE:
    f.only("topk_method", "noaux_tc", default="noaux_tc")
    f.only("scoring_func", "sigmoid", default="sigmoid")
    f.only("moe_layer_freq", 1, default=1)
    f.get("ep_size"), f.get("aux_loss_alpha"), f.get("seq_aux")
    number = f.get("n_routed_experts") or f.get("num_local_experts", 256)
    f.get("num_local_experts")
    return MoE(
        num_experts=number,
        num_experts_per_token=f.get("num_experts_per_tok", 8),
        d_ff=f.need("moe_intermediate_size"),
        num_shared_experts=f.get("n_shared_experts", 1),
        router="sigmoid",
        renormalize=f.get("norm_topk_prob", True),
        routed_scale=float(f.get("routed_scaling_factor", 2.5)),
        num_groups=f.get("n_group", 8),
        groups_per_token=f.get("topk_group", 4),
    )


def write(config: LMConfig) -> dict[str, Any]:
    layers = config.stack.layers()
    attention, experts, dense = mixer_at(layers[0], 0, LatentAttention), first(layers, MoE), every(layers, SwiGLU)
    return {
        **write_model(config),
        **write_rope(attention, attention.rotary_dim),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "qk_nope_head_dim": attention.key_dim,
        "qk_rope_head_dim": attention.rotary_dim,
        "v_head_dim": attention.values,
        "kv_lora_rank": attention.kv_rank,
        "q_lora_rank": attention.query_rank,
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_token,
        "moe_intermediate_size": experts.d_ff,
        "n_shared_experts": experts.num_shared_experts,
        "norm_topk_prob": experts.renormalize,
        "routed_scaling_factor": experts.routed_scale,
        "n_group": experts.num_groups,
        "topk_group": experts.groups_per_token,
        "first_k_dense_replace": len(dense),
        "intermediate_size": dense[0].d_ff if dense else experts.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
    }


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config)
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.", f"model.layers.{number}."
        attention, channel = block.mixers
        yield vector(f"{ours}0.norm.scale", f"{theirs}input_layernorm.weight", d)
        yield from latent_attention_links(attention, d, f"{ours}0.mixer.", f"{theirs}self_attn.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}post_attention_layernorm.weight", d)
        yield from deepseek_channel_links(channel, d, f"{ours}1.mixer.", f"{theirs}mlp.")


ARCHITECTURE = Architecture("deepseek_v3", "DeepseekV3ForCausalLM", read, write, links)
