"""Pieces that the maps share: attention, feed-forwards, experts, Mamba-2, and what is around the layers."""

import math
from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Unfit
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, Part, depthwise_conv, fused_linear, fused_vector, linear, vector
from mlt.export.huggingface.rope import read_rope, write_rope
from mlt.mixers.base import MixerConfig
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.parallel import Parallel
from mlt.model.block import Block
from mlt.model.lm import LMConfig


def read_model(f: Fields, **more: Any) -> dict[str, Any]:
    """The arguments of LMConfig that every architecture names alike, but for the stack."""
    return {
        "d_model": f.need("hidden_size"),
        "vocab_size": f.need("vocab_size"),
        "tie_embeddings": f.get("tie_word_embeddings", False),
        **more,
    }


def write_model(config: LMConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.d_model,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.stack.num_layers,
        "tie_word_embeddings": config.tie_embeddings,
    }


def model_links(
    config: LMConfig, *, prefix: str = "model.", embed: str = "embed_tokens", norm: str = "norm", head: str = "lm_head"
) -> Iterator[Link]:
    """Embedding, final norm and head."""
    shape = (config.vocab_size, config.d_model)
    yield vector("embed.table", f"{prefix}{embed}.weight", *shape)
    yield vector("norm.scale", f"{prefix}{norm}.weight", config.d_model)
    if not config.tie_embeddings:
        yield linear("head", f"{head}.weight", *shape)


def read_attention(f: Fields, **more: Any) -> Attention:
    """Attention of the Llama kind; `more` replaces or adds fields."""
    heads, bias = f.need("num_attention_heads"), f.get("attention_bias", False)
    head_dim = f.get("head_dim", f.need("hidden_size") // heads)
    fields = {
        "num_heads": heads,
        "num_kv_heads": f.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "qkv_bias": bias,
        "output_bias": bias,
    }
    if "rope_base" not in more:
        fields |= read_rope(f, more.get("head_dim", head_dim))
    return Attention(**{**fields, **more})


def write_attention(a: Attention) -> dict[str, Any]:
    return {
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "attention_bias": a.qkv_bias,
        **write_rope(a),
    }


def attention_links(a: Attention, d: int, ours: str, theirs: str, *, output: str = "o_proj") -> Iterator[Link]:
    """Projections q, k, v and output, their biases, and the norms of q and k."""
    width, kv = a.num_heads * a.head_dim, a.kv_heads * a.head_dim
    projections = [("key", "k_proj", kv), ("value", "v_proj", kv)]
    if a.output_gate:
        # Each head's rows are its query's, then its gate's.
        parts = (Part(f"{ours}query.kernel", a.head_dim, (2, 0, 1)), Part(f"{ours}gate.kernel", a.head_dim, (2, 0, 1)))
        view = (a.num_heads, 2 * a.head_dim, d)
        yield Link((f"{theirs}q_proj.weight",), (2 * width, d), parts, view, axis=1)
    else:
        projections.append(("query", "q_proj", width))
    for mine, other, size in projections:
        yield linear(f"{ours}{mine}.kernel", f"{theirs}{other}.weight", size, d)
        if a.qkv_bias:
            yield vector(f"{ours}{mine}.bias", f"{theirs}{other}.bias", size)
    yield linear(f"{ours}output.kernel", f"{theirs}{output}.weight", d, width)
    if a.output_bias:
        yield vector(f"{ours}output.bias", f"{theirs}{output}.bias", d)
    if a.qk_norm:
        yield vector(f"{ours}query_norm.scale", f"{theirs}q_norm.weight", a.head_dim)
        yield vector(f"{ours}key_norm.scale", f"{theirs}k_norm.weight", a.head_dim)


def swiglu_links(d_ff: int, d: int, ours: str, theirs: str, *, bias: bool = False) -> Iterator[Link]:
    for mine, other, shape in (("gate", "gate_proj", (d_ff, d)), ("up", "up_proj", (d_ff, d)), ("down", "down_proj", (d, d_ff))):
        yield linear(f"{ours}{mine}.kernel", f"{theirs}{other}.weight", *shape)
        if bias:
            yield vector(f"{ours}{mine}.bias", f"{theirs}{other}.bias", shape[0])


def expert_links(
    m: MoE,
    d: int,
    ours: str,
    theirs: str,
    *,
    router: str = "gate",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Link]:
    """The router and one tensor per expert and projection."""
    yield linear(f"{ours}router", f"{theirs}{router}.weight", m.num_experts, d)
    for mine, other, shape in zip(("gate", "up", "down"), names, ((m.d_ff, d), (m.d_ff, d), (d, m.d_ff)), strict=True):
        tensors = tuple(f"{theirs}experts.{expert}.{other}.weight" for expert in range(m.num_experts))
        # A single expert is not stacked, so its part has two dims.
        order = (0, 2, 1) if m.num_experts > 1 else (1, 0)
        yield Link(tensors, shape, (Part(f"{ours}{mine}", m.num_experts if m.num_experts > 1 else shape[0], order),))


def mamba2_links(m: Mamba2, d: int, ours: str, theirs: str) -> Iterator[Link]:
    """Fused input projection (gate, x, B, C, step), fused convolution (x, B, C), and the rest."""
    inner, shared = m.num_heads * m.head_dim, m.num_groups * m.state_dim
    columns = (("gate", inner), ("value", inner), ("write", shared), ("read", shared), ("step_size", m.num_heads))
    convs = (("value_conv", inner), ("write_conv", shared), ("read_conv", shared))
    yield fused_linear(f"{theirs}in_proj.weight", d, ((f"{ours}{name}.kernel", size) for name, size in columns))
    yield depthwise_conv(f"{theirs}conv1d.weight", m.conv_width, ((f"{ours}{name}.kernel", size) for name, size in convs))
    if m.conv_bias:
        yield fused_vector(f"{theirs}conv1d.bias", ((f"{ours}{name}.bias", size) for name, size in convs))
    yield vector(f"{ours}A_log", f"{theirs}A_log", m.num_heads)
    yield vector(f"{ours}dt_bias", f"{theirs}dt_bias", m.num_heads)
    yield vector(f"{ours}skip", f"{theirs}D", m.num_heads)
    if m.norm != "none":
        yield vector(f"{ours}norm_scale", f"{theirs}norm.weight", inner)
    yield linear(f"{ours}output.kernel", f"{theirs}out_proj.weight", d, inner)


def read_mamba2(f: Fields, **more: Any) -> Mamba2:
    """Mamba-2 as the hybrids spell it; `more` replaces or adds fields."""
    heads = f.need("mamba_n_heads")
    inner = int(f.get("mamba_expand", 2) * f.need("hidden_size"))
    head_dim = f.get("mamba_d_head", "auto")
    f.only("mamba_proj_bias", False, default=False)
    return Mamba2(
        **{
            "num_heads": heads,
            "head_dim": inner // heads if head_dim == "auto" else head_dim,
            "state_dim": f.get("mamba_d_state", 256),
            "num_groups": f.get("mamba_n_groups", 1),
            "conv_width": f.get("mamba_d_conv", 4),
            "conv_bias": f.get("mamba_conv_bias", True),
            "step_limit": read_step_limit(f),
            **more,
        }
    )


def write_mamba2(m: Mamba2, d: int) -> dict[str, Any]:
    inner = m.num_heads * m.head_dim
    return {
        "mamba_n_heads": m.num_heads,
        "mamba_d_head": m.head_dim,
        "mamba_expand": inner // d if inner % d == 0 else inner / d,
        "mamba_d_state": m.state_dim,
        "mamba_n_groups": m.num_groups,
        "mamba_d_conv": m.conv_width,
        "mamba_conv_bias": m.conv_bias,
        **write_step_limit(m),
    }


def read_step_limit(f: Fields) -> tuple[float, float | None] | None:
    """The limits of Mamba-2's step size; (0, infinity) is none."""
    # JSON has no infinity: transformers writes it as a mapping.
    low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in f.get("time_step_limit", (0.0, math.inf)))
    if math.isinf(high):
        return None if low == 0.0 else (low, None)
    return low, high


def write_step_limit(m: Mamba2) -> dict[str, Any]:
    if m.step_limit is None:
        return {}
    low, high = m.step_limit
    return {"time_step_limit": [low, {"__float__": "Infinity"} if high is None else high]}


def mixer_at(block: Block | Parallel, index: int, *kinds: type[MixerConfig]) -> Any:
    """The mixer at a place of a block, of one of these classes.

    Raises:
        Unfit: it is another.
    """
    if index >= len(block.mixers) or type(block.mixers[index]) not in kinds:
        found = [type(mixer).__name__ for mixer in block.mixers]
        raise Unfit(f"a layer is {found}, not with {' or '.join(kind.__name__ for kind in kinds)} at place {index}")
    return block.mixers[index]


def swiglu_width(f: Fields) -> SwiGLU:
    """A dense feed-forward of silu."""
    f.only("hidden_act", "silu", "swish", default="silu")
    return SwiGLU(d_ff=f.need("intermediate_size"), bias=f.get("mlp_bias", False))
