"""Mamba-2 (arXiv 2405.21060): one mixer a layer, no feed-forward."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, vector
from mlt.export.huggingface.parts import (
    mamba2_links,
    mixer_at,
    model_links,
    read_model,
    read_step_limit,
    write_model,
    write_step_limit,
)
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.model.block import Block
from mlt.model.lm import LMConfig


def read(f: Fields) -> LMConfig:
    eps, width = f.get("layer_norm_epsilon", 1e-5), f.need("hidden_size")
    f.only("hidden_act", "silu", default="silu")
    f.only("use_bias", False, default=False)
    head_dim = f.get("head_dim", 64)
    inner = int(f.get("expand", 2) * width)
    mixer = Mamba2(
        num_heads=f.get("num_heads", inner // head_dim),
        head_dim=head_dim,
        state_dim=f.get("state_size", 128),
        num_groups=f.get("n_groups", 8),
        conv_width=f.get("conv_kernel", 4),
        conv_bias=f.get("use_conv_bias", True),
        norm_eps=eps,
        step_limit=read_step_limit(f),
    )
    f.only("rms_norm", True, default=True)
    block = Block(mixers=(mixer,), norm_eps=eps)
    return LMConfig(**read_model(f), stack=stack_of([block] * f.need("num_hidden_layers")), norm_eps=eps)


def write(config: LMConfig) -> dict[str, Any]:
    mixer = mixer_at(config.stack.layers()[0], 0, Mamba2)
    inner = mixer.num_heads * mixer.head_dim
    return {
        **write_model(config),
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "expand": inner // config.d_model if inner % config.d_model == 0 else inner / config.d_model,
        "state_size": mixer.state_dim,
        "n_groups": mixer.num_groups,
        "conv_kernel": mixer.conv_width,
        "use_conv_bias": mixer.conv_bias,
        "layer_norm_epsilon": config.norm_eps,
        "hidden_act": "silu",
        **write_step_limit(mixer),
    }


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config, prefix="backbone.", embed="embeddings", norm="norm_f")
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.0.", f"backbone.layers.{number}."
        (mixer,) = block.mixers
        yield vector(f"{ours}norm.scale", f"{theirs}norm.weight", d)
        yield from mamba2_links(mixer, d, f"{ours}mixer.", f"{theirs}mixer.")


ARCHITECTURE = Architecture("mamba2", "Mamba2ForCausalLM", read, write, links)
