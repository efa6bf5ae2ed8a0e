"""Mamba (arXiv 2312.00752): one selective scan a layer, no feed-forward."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, vector
from mlt.export.huggingface.parts import mixer_at, model_links, read_model, write_model
from mlt.export.huggingface.selective import mamba_links, rank_of
from mlt.mixers.sequence.mamba import Mamba
from mlt.model.block import Block
from mlt.model.lm import LMConfig

# Of the initialization, and how the same scan is computed there.
_UNREAD = ("time_step_scale", "time_step_init_scheme", "use_mambapy", "use_associative_scan", "rms_norm")


def read(f: Fields) -> LMConfig:
    for name in _UNREAD:
        f.get(name)
    eps, width = f.get("layer_norm_epsilon", 1e-5), f.need("hidden_size")
    f.only("hidden_act", "silu", default="silu")
    f.only("use_bias", False, default=False)
    inner = int(f.get("expand", 2) * width)
    f.only("intermediate_size", inner, default=inner)
    mixer = Mamba(
        inner=inner,
        state_dim=f.get("state_size", 16),
        step_rank=rank_of(f.get("time_step_rank", "auto")),
        conv_width=f.get("conv_kernel", 4),
        conv_bias=f.get("use_conv_bias", True),
    )
    block = Block(mixers=(mixer,), norm_eps=eps)
    model = read_model(f, tie_embeddings=f.get("tie_word_embeddings", True))
    return LMConfig(**model, stack=stack_of([block] * f.need("num_hidden_layers")), norm_eps=eps)


def write(config: LMConfig) -> dict[str, Any]:
    d, mixer = config.d_model, mixer_at(config.stack.layers()[0], 0, Mamba)
    inner = mixer.channels(d)
    return {
        **write_model(config),
        "expand": inner // d if inner % d == 0 else inner / d,
        "state_size": mixer.state_dim,
        "time_step_rank": mixer.rank(d),
        "conv_kernel": mixer.conv_width,
        "use_conv_bias": mixer.conv_bias,
        "layer_norm_epsilon": config.norm_eps,
        "hidden_act": "silu",
    }


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config, prefix="backbone.", embed="embeddings", norm="norm_f")
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.0.", f"backbone.layers.{number}."
        (mixer,) = block.mixers
        yield vector(f"{ours}norm.scale", f"{theirs}norm.weight", d)
        yield from mamba_links(mixer, d, f"{ours}mixer.", f"{theirs}mixer.")


ARCHITECTURE = Architecture("mamba", "MambaForCausalLM", read, write, links)
