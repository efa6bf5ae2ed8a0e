"""xLSTM 7B (arXiv 2503.13427): mLSTM and SwiGLU in every layer."""

from collections.abc import Iterator
from typing import Any

from mlt.export.huggingface.architecture import Architecture, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, linear, vector
from mlt.export.huggingface.parts import mixer_at, model_links, read_model, write_model
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.mlstm import MLSTM
from mlt.model.block import Block
from mlt.model.lm import LMConfig

_HEAD_EPS = 1e-6  # of our norm of each head
# How the same numbers are computed there.
_RUNTIME = (
    *("autocast_kernel_dtype", "chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "return_last_states"),
    *("inference_state_dtype", "max_inference_chunksize", "norm_reduction_force_float32", "eps", "embedding_dim", "num_blocks"),
)


def read(f: Fields) -> LMConfig:
    for name in _RUNTIME:
        f.get(name)
    d, eps, heads = f.need("hidden_size"), f.only("norm_eps", _HEAD_EPS, default=_HEAD_EPS), f.need("num_heads")
    f.only("use_bias", False, default=False)
    f.only("weight_mode", "single", default="single")
    f.only("add_out_norm", True, default=True)
    mixer = MLSTM(
        num_heads=heads,
        key_dim=int(d * f.get("qk_dim_factor", 0.5)) // heads,
        value_dim=int(d * f.get("v_dim_factor", 1.0)) // heads,
        gate_soft_cap=float(f.get("gate_soft_cap", 15.0)),
    )
    multiple = f.get("ffn_round_up_to_multiple_of", 64)
    dense = SwiGLU(d_ff=int((d * f.get("ffn_proj_factor", 2.667) + multiple - 1) // multiple * multiple))
    block = Block(mixers=(mixer, dense), norm_eps=eps)
    count = f.need("num_hidden_layers")
    cap = f.get("output_logit_soft_cap")
    return LMConfig(**read_model(f), stack=stack_of([block] * count), norm_eps=eps, logit_softcap=cap and float(cap))


def write(config: LMConfig) -> dict[str, Any]:
    block = config.stack.layers()[0]
    mixer, dense = mixer_at(block, 0, MLSTM), mixer_at(block, 1, SwiGLU)
    return {
        **write_model(config),
        "num_heads": mixer.num_heads,
        "qk_dim_factor": _factor(mixer.num_heads * mixer.key_dim, config.d_model),
        "v_dim_factor": _factor(mixer.num_heads * mixer.values, config.d_model),
        "gate_soft_cap": mixer.gate_soft_cap,
        "ffn_proj_factor": _factor(dense.d_ff, config.d_model),
        "ffn_round_up_to_multiple_of": 1,
        "output_logit_soft_cap": config.logit_softcap,
        "norm_eps": config.norm_eps,
    }


def _factor(size: int, d: int) -> float:
    """A factor that gives `size` back when d times it is rounded down."""
    return size / d if int(d * (size / d)) == size else (size + 0.25) / d


def links(config: LMConfig) -> Iterator[Link]:
    d = config.d_model
    yield from model_links(config, prefix="backbone.", embed="embeddings", norm="out_norm")
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.", f"backbone.blocks.{number}."
        mixer, dense = block.mixers
        yield vector(f"{ours}0.norm.scale", f"{theirs}norm_mlstm.weight", d)
        yield from _mixer_links(mixer, d, f"{ours}0.mixer.", f"{theirs}mlstm_layer.")
        yield vector(f"{ours}1.norm.scale", f"{theirs}norm_ffn.weight", d)
        for mine, other, shape in (("gate", "proj_up_gate", (dense.d_ff, d)), ("up", "proj_up", (dense.d_ff, d))):
            yield linear(f"{ours}1.mixer.{mine}.kernel", f"{theirs}ffn.{other}.weight", *shape)
        yield linear(f"{ours}1.mixer.down.kernel", f"{theirs}ffn.proj_down.weight", d, dense.d_ff)


def _mixer_links(m: MLSTM, d: int, ours: str, theirs: str) -> Iterator[Link]:
    keys, values = m.num_heads * m.key_dim, m.num_heads * m.values
    for mine, other, size in (("query", "q", keys), ("key", "k", keys), ("value", "v", values), ("gate", "ogate_preact", values)):
        yield linear(f"{ours}{mine}.kernel", f"{theirs}{other}.weight", size, d)
    for mine, other in (("input", "igate_preact"), ("forget", "fgate_preact")):
        yield linear(f"{ours}{mine}_gate.kernel", f"{theirs}{other}.weight", m.num_heads, d)
        yield vector(f"{ours}{mine}_bias", f"{theirs}{other}.bias", m.num_heads)
    yield vector(f"{ours}norm.scale", f"{theirs}multihead_norm.weight", values)
    yield linear(f"{ours}output.kernel", f"{theirs}out_proj.weight", d, values)


ARCHITECTURE = Architecture("xlstm", "xLSTMForCausalLM", read, write, links)
