"""Zamba2 (arXiv 2411.15242): Mamba-2, with transformer blocks in front of some layers whose weights several depths share."""

from collections.abc import Iterator, Sequence
from typing import Any

from mlt.export.huggingface.architecture import Architecture, Unfit, stack_of
from mlt.export.huggingface.fields import Fields
from mlt.export.huggingface.links import Link, fused_linear, linear, vector
from mlt.export.huggingface.parts import mamba2_links, mixer_at, model_links, read_model, write_model
from mlt.export.huggingface.rope import read_rope
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.zamba import SharedTransformer, ZambaLayer
from mlt.model.block import Block
from mlt.model.lm import LMConfig

_MEMORY_EPS = 1e-5  # of the norm inside Mamba-2, whatever rms_norm_eps says
_OLD = {"mamba": "linear_attention"}
# Sizes that follow from others, and how the same numbers are computed there.
_UNREAD = (
    *("kv_channels", "num_query_groups", "attention_hidden_size", "hybrid_layer_ids", "use_mem_eff_path"),
    *("layer_types", "mamba_headdim", "lora_rank"),
)


def read(f: Fields) -> LMConfig:
    eps, d = f.get("rms_norm_eps", 1e-5), f.need("hidden_size")
    for name in _UNREAD:
        f.get(name)
    f.only("add_bias_linear", False, default=False)
    f.only("hidden_act", "gelu", default="gelu")
    f.only("use_long_context", False, default=False)
    memory, transformer = _read_mamba(f, d), _read_transformer(f, d, eps)
    count, rank, attends = f.get("num_mem_blocks", 1), f.get("adapter_rank", 128), f.get("use_shared_attention_adapter", False)
    if attends and transformer.kv_heads != transformer.num_heads:
        f.refuse("num_key_value_heads", transformer.kv_heads, "must be num_attention_heads beside use_shared_attention_adapter")
    kinds = [_OLD.get(kind, kind) for kind in f.need("layers_block_type")]
    f.get("num_hidden_layers")
    for kind in sorted(set(kinds) - {"linear_attention", "hybrid"}):
        f.refuse("layers_block_type", kind, "only 'linear_attention' or 'hybrid' can be expressed")
    blocks, uses = [], 0
    for kind in kinds:
        mixer = memory
        if kind == "hybrid":
            names = {"name": f"shared_{uses % count}", "adapter_rank": rank, "attention_adapter": attends, "norm_eps": eps}
            mixer = ZambaLayer(transformer=transformer, memory=memory, **names)
            uses += 1
        blocks.append(Block(mixers=(mixer,), norm_eps=eps))
    model = read_model(f, tie_embeddings=f.get("tie_word_embeddings", True))
    return LMConfig(**model, stack=stack_of(blocks), norm_eps=eps)


def _read_mamba(f: Fields, d: int) -> Mamba2:
    f.only("use_conv_bias", True, default=True)
    heads, low = f.get("n_mamba_heads", 8), f.get("time_step_min", 0.001)
    return Mamba2(
        num_heads=heads,
        head_dim=int(f.get("mamba_expand", 2) * d) // heads,
        state_dim=f.get("mamba_d_state", 64),
        num_groups=f.get("mamba_ngroups", 1),
        conv_width=f.get("mamba_d_conv", 4),
        norm_eps=_MEMORY_EPS,
        # transformers clamps steps by this one.
        step_limit=(low, None) if low else None,
    )


def _read_transformer(f: Fields, d: int, eps: float) -> SharedTransformer:
    heads = f.need("num_attention_heads")
    head_dim = 2 * d // heads
    f.only("attention_head_dim", head_dim, default=head_dim)
    f.only("head_dim", head_dim, default=head_dim)
    rope = read_rope(f, head_dim)
    rotates = f.get("use_mem_rope", False)
    for name in ("rope_scaling", "rotary_dim"):
        if rotates and rope[name] is not None:
            f.refuse(f"rope_parameters ({name})", rope[name], "cannot be expressed for the shared transformer")
    return SharedTransformer(
        num_heads=heads,
        num_kv_heads=f.get("num_key_value_heads", heads),
        head_dim=head_dim,
        d_ff=f.get("intermediate_size", 4 * d),
        rope_base=rope["rope_base"] if rotates else None,
        norm_eps=eps,
    )


def write(config: LMConfig) -> dict[str, Any]:
    d, mixers = config.d_model, [mixer_at(block, 0, Mamba2, ZambaLayer) for block in config.stack.layers()]
    uses = _uses(mixers)
    memory = uses[0].memory
    if not isinstance(memory, Mamba2):
        raise Unfit(f"the recurrent mixer of a shared layer is {type(memory).__name__}, not Mamba2")
    transformer, inner = uses[0].transformer, memory.num_heads * memory.head_dim
    if uses[0].adapter_rank is None:
        raise Unfit("a use of the shared transformer has no adapter (adapter_rank = None)")
    return {
        **write_model(config),
        "layers_block_type": ["hybrid" if isinstance(mixer, ZambaLayer) else "linear_attention" for mixer in mixers],
        "num_mem_blocks": len({use.name for use in uses}),
        "adapter_rank": uses[0].adapter_rank,
        "use_shared_attention_adapter": uses[0].attention_adapter,
        "num_attention_heads": transformer.num_heads,
        "num_key_value_heads": transformer.kv_heads,
        "intermediate_size": transformer.d_ff,
        "use_mem_rope": transformer.rope_base is not None,
        "rope_parameters": {"rope_theta": transformer.rope_base or 10_000.0, "rope_type": "default"},
        "n_mamba_heads": memory.num_heads,
        "mamba_expand": inner // d if inner % d == 0 else inner / d,
        "mamba_d_state": memory.state_dim,
        "mamba_ngroups": memory.num_groups,
        "mamba_d_conv": memory.conv_width,
        "time_step_min": 0.0 if memory.step_limit is None else memory.step_limit[0],
        "hidden_act": "gelu",
        "rms_norm_eps": config.norm_eps,
    }


def _uses(mixers: Sequence[Any]) -> list[ZambaLayer]:
    """The layers with a shared transformer, in depth order.

    Raises:
        Unfit: there is none.
    """
    uses = [mixer for mixer in mixers if isinstance(mixer, ZambaLayer)]
    if not uses:
        raise Unfit("it has no ZambaLayer")
    return uses


def links(config: LMConfig) -> Iterator[Link]:
    """A shared transformer and the adapters of all its uses lie where it is used first."""
    d, homes, uses = config.d_model, dict[str, str](), 0
    yield from model_links(config, norm="final_layernorm")
    for number, block in enumerate(config.stack.layers()):
        ours, theirs = f"layers.{number}.sub_layers.0.", f"model.layers.{number}."
        (mixer,) = block.mixers
        if isinstance(mixer, Mamba2):
            yield vector(f"{ours}norm.scale", f"{theirs}input_layernorm.weight", d)
            yield from mamba2_links(mixer, d, f"{ours}mixer.", f"{theirs}mamba.")
            continue
        home = homes.setdefault(mixer.name, f"{theirs}shared_transformer.")
        if home.startswith(theirs):
            yield from _transformer_links(mixer.transformer, d, f"stack.shared.{mixer.name}.", home)
        rank, width, adapter = mixer.adapter_rank, mixer.transformer.d_ff, f"{home}feed_forward.gate_up_proj_adapter_list.{uses}."
        yield linear(f"{ours}mixer.adapter.down.kernel", f"{adapter}0.weight", rank, d)
        halves = ((f"{ours}mixer.adapter.gate.kernel", width), (f"{ours}mixer.adapter.up.kernel", width))
        yield fused_linear(f"{adapter}1.weight", rank, halves)
        if mixer.attention_adapter:
            yield from _adapter_links(mixer, d, f"{ours}mixer.attention_adapter.", f"{home}self_attn.linear_", uses)
        yield linear(f"{ours}mixer.join.kernel", f"{theirs}linear.weight", d, d)
        yield vector(f"{ours}mixer.norm.scale", f"{theirs}mamba_decoder.input_layernorm.weight", d)
        yield from mamba2_links(mixer.memory, d, f"{ours}mixer.memory.", f"{theirs}mamba_decoder.mamba.")
        uses += 1


def _adapter_links(mixer: ZambaLayer, d: int, ours: str, theirs: str, use: int) -> Iterator[Link]:
    for name in ("query", "key", "value"):
        place = f"{theirs}{name[0]}_adapter_list.{use}."
        yield linear(f"{ours}{name}.down.kernel", f"{place}0.weight", mixer.adapter_rank, 2 * d)
        width = mixer.transformer.num_heads * mixer.transformer.head_dim
        yield linear(f"{ours}{name}.up.kernel", f"{place}1.weight", width, mixer.adapter_rank)


def _transformer_links(t: SharedTransformer, d: int, ours: str, theirs: str) -> Iterator[Link]:
    width, keys = t.num_heads * t.head_dim, t.kv_heads * t.head_dim
    yield vector(f"{ours}norm.scale", f"{theirs}input_layernorm.weight", 2 * d)
    yield vector(f"{ours}ffn_norm.scale", f"{theirs}pre_ff_layernorm.weight", d)
    for mine, other, size in (("query", "q", width), ("key", "k", keys), ("value", "v", keys)):
        yield linear(f"{ours}{mine}.kernel", f"{theirs}self_attn.{other}_proj.weight", size, 2 * d)
    yield linear(f"{ours}mix.kernel", f"{theirs}self_attn.o_proj.weight", d, width)
    halves = ((f"{ours}gate.kernel", t.d_ff), (f"{ours}up.kernel", t.d_ff))
    yield fused_linear(f"{theirs}feed_forward.gate_up_proj.weight", d, halves)
    yield linear(f"{ours}down.kernel", f"{theirs}feed_forward.down_proj.weight", d, t.d_ff)


ARCHITECTURE = Architecture("zamba2", "Zamba2ForCausalLM", read, write, links)
