"""Nemotron-H (arXiv 2504.03624): layers of one mixer each: Mamba-2, squared-ReLU feed-forward, or attention without positions."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, every, first, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, linear, vector
from mlt.export.huggingface.parts import (
    attention_links,
    mamba2_links,
    mixer_at,
    model_links,
    read_attention,
    read_model,
    read_step_limit,
    write_attention,
    write_model,
)
from mlt.mixers.channel.mlp import MLP
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.model.block import Block
from mlt.model.lm import LMConfig

_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_OLD = {"mamba": "linear_attention", "attention": "full_attention"}
# Read by expert layers, which there are none of, and by extra prediction layers, which transformers does not run.
_UNREAD = (
    *("moe_intermediate_size", "moe_latent_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_overlap"),
    *("mtp_layers_block_type", "mtp_hybrid_override_pattern", "num_nextn_predict_layers", "n_group", "topk_group"),
    *("n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor"),
    *("num_hidden_layers", "hidden_dropout", "mamba_ssm_cache_dtype", "expand"),
)


def read(f: Fields) -> LMConfig:
    eps = f.get("layer_norm_epsilon", 1e-5)
    for name in _UNREAD:
        f.get(name)
    pattern = f.get("hybrid_override_pattern", "")
    kinds = f.get("layers_block_type") or f.get("layer_types") or [_LETTERS[letter] for letter in pattern]
    f.get("layer_types")
    kinds = [_OLD.get(kind, kind) for kind in kinds]
    mixers = {
        "linear_attention": _read_mamba(f, eps),
        "full_attention": read_attention(f, rope_base=None, window=f.get("sliding_window")),
        "mlp": _read_mlp(f),
    }
    for kind in sorted(set(kinds) - set(mixers)):
        f.refuse("layers_block_type", kind, f"only {', '.join(mixers)} can be expressed")
    blocks = [Block(mixers=(mixers.get(kind, mixers["mlp"]),), norm_eps=eps) for kind in kinds]
    return LMConfig(**read_model(f), stack=stack_of(blocks), norm_eps=eps)


def _read_mlp(f: Fields) -> MLP:
    activation = f.only("mlp_hidden_act", "relu2", "silu", "relu", "gelu", default="relu2")
    known = activation in ("relu2", "silu", "relu", "gelu")
    return MLP(d_ff=f.need("intermediate_size"), activation=activation if known else "relu2", bias=f.get("mlp_bias", False))


def _read_mamba(f: Fields, eps: float) -> Mamba2:
    f.only("mamba_hidden_act", "silu", default="silu")
    f.only("use_bias", False, default=False)
    f.only("mamba_proj_bias", False, default=False)
    # transformers clamps steps by this one and does not read time_step_limit.
    low = f.get("time_step_min", 0.001)
    if read_step_limit(f) is not None:
        f.refuse("time_step_limit", f.get("time_step_limit"), "transformers itself does not read it")
    return Mamba2(
        num_heads=f.get("mamba_num_heads", 128),
        head_dim=f.get("mamba_head_dim", 64),
        state_dim=f.get("ssm_state_size", 128),
        num_groups=f.get("n_groups", 8),
        conv_width=f.get("conv_kernel", 4),
        conv_bias=f.get("use_conv_bias", True),
        norm_eps=eps,
        step_limit=(low, None) if low else None,
    )


def write(config: LMConfig) -> dict[str, Any]:
    layers = config.stack.layers()
    names = {Mamba2: "linear_attention", Attention: "full_attention", MLP: "mlp"}
    kinds = [names[type(mixer_at(block, 0, Mamba2, Attention, MLP))] for block in layers]
    mamba = first(layers, Mamba2)
    fields = {name: value for name, value in write_model(config).items() if name != "num_hidden_layers"}
    for attention in every(layers, Attention)[:1]:
        fields |= {**write_attention(attention), "sliding_window": attention.window}
    for dense in every(layers, MLP)[:1]:
        fields |= {"intermediate_size": dense.d_ff, "mlp_hidden_act": dense.activation, "mlp_bias": dense.bias}
    return fields | {
        "layers_block_type": kinds,
        "mamba_num_heads": mamba.num_heads,
        "mamba_head_dim": mamba.head_dim,
        "ssm_state_size": mamba.state_dim,
        "n_groups": mamba.num_groups,
        "conv_kernel": mamba.conv_width,
        "use_conv_bias": mamba.conv_bias,
        "layer_norm_epsilon": config.norm_eps,
        "time_step_min": 0.0 if mamba.step_limit is None else mamba.step_limit[0],
    }


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config, prefix="backbone.", embed="embeddings", norm="norm_f")
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.0.", f"backbone.layers.{number}."
        (mixer,) = block.mixers
        yield vector(f"{ours}norm.scale", f"{theirs}norm.weight", d)
        if isinstance(mixer, Mamba2):
            yield from mamba2_links(mixer, d, f"{ours}mixer.", f"{theirs}mixer.")
        elif isinstance(mixer, Attention):
            yield from attention_links(mixer, d, f"{ours}mixer.", f"{theirs}mixer.")
        else:
            for mine, other, shape in (("up", "up_proj", (mixer.d_ff, d)), ("down", "down_proj", (d, mixer.d_ff))):
                yield linear(f"{ours}mixer.{mine}.kernel", f"{theirs}mixer.{other}.weight", *shape)
                if mixer.bias:
                    yield vector(f"{ours}mixer.{mine}.bias", f"{theirs}mixer.{other}.bias", shape[0])


ARCHITECTURE = Architecture("nemotron_h", "NemotronHForCausalLM", read, write, links)
