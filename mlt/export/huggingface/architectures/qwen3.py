"""Qwen3 (arXiv 2505.09388): Llama with norms on queries and keys, and windows in the upper layers on request."""

from typing import Any

from mlt.export.huggingface.architecture import Architecture, stack_of
from mlt.export.huggingface.architectures.llama import links
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.parts import mixer_at, read_attention, read_model, swiglu_width, write_attention, write_model
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.model.block import Block
from mlt.model.lm import LMConfig


def read(f: Fields) -> LMConfig:
    eps, count = f.get("rms_norm_eps", 1e-6), f.need("num_hidden_layers")
    dense = swiglu_width(f)
    full = read_attention(f, qk_norm=True, norm_eps=eps)
    blocks = [Block(mixers=(full.replace(window=window), dense), norm_eps=eps) for window in _windows(f, count)]
    return LMConfig(**read_model(f), stack=stack_of(blocks), norm_eps=eps)


def _windows(f: Fields, count: int) -> list[int | None]:
    kinds, first = f.get("layer_types"), f.get("max_window_layers", 28)
    window = f.get("sliding_window", 4096)
    if not f.get("use_sliding_window", False):
        return [None] * count
    if kinds is None:
        return [window if number >= first else None for number in range(count)]
    for kind in sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        f.refuse("layer_types", kind, "only 'full_attention' or 'sliding_attention' can be expressed")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def write(config: LMConfig) -> dict[str, Any]:
    layers = config.stack.layers()
    attentions = [mixer_at(block, 0, Attention) for block in layers]
    windows = [attention.window for attention in attentions if attention.window is not None]
    dense = mixer_at(layers[0], 1, SwiGLU)
    return {
        **write_model(config),
        **write_attention(attentions[0]),
        "intermediate_size": dense.d_ff,
        "mlp_bias": dense.bias,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "use_sliding_window": bool(windows),
        "sliding_window": windows[0] if windows else None,
        "layer_types": ["full_attention" if attention.window is None else "sliding_attention" for attention in attentions],
    }


ARCHITECTURE = Architecture("qwen3", "Qwen3ForCausalLM", read, write, links)
