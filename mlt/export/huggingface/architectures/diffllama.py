"""DiffLlama: Llama with differential attention (arXiv 2410.05258), its norm without a scale."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, Part, linear, vector
from mlt.export.huggingface.parts import mixer_at, model_links, read_model, swiglu_links, swiglu_width, write_model
from mlt.export.huggingface.rope import read_rope
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.differential_attention import DifferentialAttention, lambda_at
from mlt.model.block import Block
from mlt.model.lm import LMConfig


def read(f: Fields) -> LMConfig:
    eps, heads = f.get("rms_norm_eps", 1e-5), f.need("num_attention_heads")
    f.only("attention_bias", False, default=False)
    f.get("lambda_std_dev")  # of the initialization
    head_dim, kv_heads = f.get("head_dim", f.need("hidden_size") // heads), f.get("num_key_value_heads", heads)
    for name, count in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
        if count % 2:
            f.refuse(name, count, "heads come in pairs")
    rope = read_rope(f, head_dim)
    for name in ("rope_scaling", "rotary_dim"):
        if rope[name] is not None:
            f.refuse(f"rope_parameters ({name})", rope[name], "cannot be expressed for differential attention")
    attention = DifferentialAttention(
        num_heads=max(heads // 2, 1),
        num_kv_heads=max(kv_heads // 2, 1),
        head_dim=head_dim,
        rope_base=rope["rope_base"],
        norm_scale=False,
        norm_eps=eps,
    )
    dense = swiglu_width(f)
    layers = [attention.replace(lambda_init=lambda_at(layer)) for layer in range(f.need("num_hidden_layers"))]
    blocks = [Block(mixers=(layer, dense), norm_eps=eps) for layer in layers]
    return LMConfig(**read_model(f), stack=stack_of(blocks), norm_eps=eps)


def write(config: LMConfig) -> dict[str, Any]:
    block = config.stack.layers()[0]
    attention, dense = mixer_at(block, 0, DifferentialAttention), mixer_at(block, 1, SwiGLU)
    return {
        **write_model(config),
        "num_attention_heads": 2 * attention.num_heads,
        "num_key_value_heads": 2 * attention.kv_heads,
        "head_dim": attention.head_dim,
        "rope_parameters": {"rope_theta": attention.rope_base, "rope_type": "default"},
        "intermediate_size": dense.d_ff,
        "mlp_bias": dense.bias,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
    }


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config)
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.", f"model.layers.{number}."
        attention, dense = block.mixers
        yield vector(f"{ours}0.norm.scale", f"{theirs}input_layernorm.weight", d)
        yield from _attention_links(attention, d, f"{ours}0.mixer.", f"{theirs}self_attn.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}post_attention_layernorm.weight", d)
        yield from swiglu_links(dense.d_ff, d, f"{ours}1.mixer.", f"{theirs}mlp.", bias=dense.bias)


def _attention_links(a: DifferentialAttention, d: int, ours: str, theirs: str) -> Iterator[Link]:
    """The first half of the heads is the first map; a pair's value is one head of each half of the value heads."""
    h, pairs = a.head_dim, a.kv_heads
    yield linear(f"{ours}query.kernel", f"{theirs}q_proj.weight", 2 * a.num_heads * h, d)
    yield linear(f"{ours}key.kernel", f"{theirs}k_proj.weight", 2 * pairs * h, d)
    value = Part(f"{ours}value.kernel", 2 * pairs * h, (3, 1, 0, 2), (2, pairs, h, d))
    yield Link((f"{theirs}v_proj.weight",), (2 * pairs * h, d), (value,))
    yield linear(f"{ours}output.kernel", f"{theirs}o_proj.weight", d, 2 * a.num_heads * h)
    for mine, other in (("query_lambda", "lambda_q"), ("key_lambda", "lambda_k")):
        yield Link((f"{theirs}{other}1", f"{theirs}{other}2"), (h,), (Part(f"{ours}{mine}", 2),))


ARCHITECTURE = Architecture("diffllama", "DiffLlamaForCausalLM", read, write, links)
