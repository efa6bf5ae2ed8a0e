"""Falcon-H1 (arXiv 2507.22448): Mamba-2 and attention side by side in every layer, and a multiplier on everything."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, stack_of
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
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.parallel import Parallel
from mlt.model.block import Block
from mlt.model.lm import LMConfig


def read(f: Fields) -> LMConfig:
    eps, one = f.get("rms_norm_eps", 1e-5), (1.0, 1.0)
    f.only("projectors_bias", False, default=False)
    attention = read_attention(f)
    # A factor on the keys is one on the scores.
    attention = attention.replace(scale=attention.head_dim**-0.5 * f.get("key_multiplier", 1.0))
    parallel = Parallel(
        mixers=(_read_mamba(f, eps), attention),
        input_scales=(float(f.get("ssm_in_multiplier", 1.0)), float(f.get("attention_in_multiplier", 1.0))),
        output_scales=(float(f.get("ssm_out_multiplier", 1.0)), float(f.get("attention_out_multiplier", 1.0))),
    )
    gate, down = f.get("mlp_multipliers", one)
    dense = swiglu_width(f).replace(gate_scale=float(gate), output_scale=float(down))
    block = Block(mixers=(parallel, dense), norm_eps=eps)
    scales = {"embed_scale": float(f.get("embedding_multiplier", 1.0)), "logit_scale": float(f.get("lm_head_multiplier", 1.0))}
    return LMConfig(**read_model(f), stack=stack_of([block] * f.need("num_hidden_layers")), norm_eps=eps, **scales)


def _read_mamba(f: Fields, eps: float) -> Mamba2:
    """The norm is off by default; the file's mamba_norm_before_gate counts where it is on."""
    first, normed = f.get("mamba_norm_before_gate", True), f.get("mamba_rms_norm", False)
    heads, head_dim = f.need("mamba_n_heads"), f.get("mamba_d_head", "auto")
    inner = f.get("mamba_d_ssm") or int(f.get("mamba_expand", 2) * f.need("hidden_size"))
    head_dim = inner // heads if head_dim == "auto" else head_dim
    # transformers checks these against each other and computes with heads and their width.
    f.get("mamba_use_mlp"), f.get("mamba_expand")
    norm = "none" if not normed else "before_gate" if first else "after_gate"
    scales = tuple(float(scale) for scale in f.get("ssm_multipliers", (1.0,) * 5))
    return read_mamba2(f, head_dim=head_dim, norm=norm, norm_eps=eps, projection_scales=scales)


def write(config: LMConfig) -> dict[str, Any]:
    block = config.stack.layers()[0]
    parallel, dense = mixer_at(block, 0, Parallel), mixer_at(block, 1, SwiGLU)
    mamba, attention = mixer_at(parallel, 0, Mamba2), mixer_at(parallel, 1, Attention)
    plain = attention.head_dim**-0.5
    return {
        **write_model(config),
        **write_attention(attention),
        **write_mamba2(mamba, config.d_model),
        "mamba_d_ssm": mamba.num_heads * mamba.head_dim,
        "mamba_rms_norm": mamba.norm != "none",
        "mamba_norm_before_gate": mamba.norm != "after_gate",
        "ssm_multipliers": list(mamba.projection_scales or (1.0,) * 5),
        "key_multiplier": (plain if attention.scale is None else attention.scale) / plain,
        "ssm_in_multiplier": (parallel.input_scales or (1.0, 1.0))[0],
        "attention_in_multiplier": (parallel.input_scales or (1.0, 1.0))[1],
        "ssm_out_multiplier": (parallel.output_scales or (1.0, 1.0))[0],
        "attention_out_multiplier": (parallel.output_scales or (1.0, 1.0))[1],
        "mlp_multipliers": [dense.gate_scale, dense.output_scale],
        "embedding_multiplier": config.embed_scale,
        "lm_head_multiplier": config.logit_scale,
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
        parallel, dense = block.mixers
        mamba, attention = parallel.mixers
        yield vector(f"{ours}0.norm.scale", f"{theirs}input_layernorm.weight", d)
        yield from mamba2_links(mamba, d, f"{ours}0.mixer.mixers.0.", f"{theirs}mamba.")
        yield from attention_links(attention, d, f"{ours}0.mixer.mixers.1.", f"{theirs}self_attn.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}pre_ff_layernorm.weight", d)
        yield from swiglu_links(dense.d_ff, d, f"{ours}1.mixer.", f"{theirs}feed_forward.", bias=dense.bias)


ARCHITECTURE = Architecture("falcon_h1", "FalconH1ForCausalLM", read, write, links)
