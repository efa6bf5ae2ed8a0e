"""Latent attention and biased experts as DeepSeek-V3 and Kimi Linear spell them."""

from collections.abc import Iterator

from mlt.export.huggingface.links import Link, Part, linear, vector
from mlt.export.huggingface.parts import expert_links, swiglu_links
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.latent_attention import LatentAttention


def latent_attention_links(a: LatentAttention, d: int, ours: str, theirs: str, *, paired: bool = True) -> Iterator[Link]:
    """Latents and what is read out of them.

    Args:
        a: the attention.
        d: width of the stream.
        ours, theirs: prefixes of the names.
        paired: rotated channels lie in pairs of neighbours there and in two halves here; False where none is rotated.
    """
    heads, nope, rotary, rank, values = a.num_heads, a.key_dim, a.rotary_dim, a.kv_rank, a.values
    source, name = (d, "q_proj") if a.query_rank is None else (a.query_rank, "q_b_proj")
    if a.query_rank is not None:
        yield linear(f"{ours}query_down.kernel", f"{theirs}q_a_proj.weight", a.query_rank, d)
        yield vector(f"{ours}query_norm.scale", f"{theirs}q_a_layernorm.weight", a.query_rank)
    turned = Part(f"{ours}query_rotary.kernel", rotary, (2, 0, 1))
    shared = Part(f"{ours}key_rotary.kernel", rotary, (1, 0))
    if paired:
        turned = Part(turned.ours, rotary, (3, 0, 2, 1), (heads, rotary // 2, 2, source))
        shared = Part(shared.ours, rotary, (2, 1, 0), (rotary // 2, 2, d))
    parts = (Part(f"{ours}query.kernel", nope, (2, 0, 1)), turned)
    rows = heads * (nope + rotary)
    yield Link((f"{theirs}{name}.weight",), (rows, source), parts, (heads, nope + rotary, source), axis=1)
    parts = (Part(f"{ours}down.kernel", rank, (1, 0)), shared)
    yield Link((f"{theirs}kv_a_proj_with_mqa.weight",), (rank + rotary, d), parts)
    yield vector(f"{ours}norm.scale", f"{theirs}kv_a_layernorm.weight", rank)
    parts = (Part(f"{ours}key.kernel", nope, (2, 0, 1)), Part(f"{ours}value.kernel", values, (2, 0, 1)))
    rows = heads * (nope + values)
    yield Link((f"{theirs}kv_b_proj.weight",), (rows, rank), parts, (heads, nope + values, rank), axis=1)
    yield linear(f"{ours}output.kernel", f"{theirs}o_proj.weight", d, heads * values)


def deepseek_channel_links(
    mixer: MoE | SwiGLU,
    d: int,
    ours: str,
    theirs: str,
    *,
    experts: str | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Link]:
    """A dense feed-forward, or experts with the bias that chooses them and a shared one.

    Args:
        mixer: of the layer.
        d: width of the stream.
        ours, theirs: prefixes of the names.
        experts: prefix of the experts where it is not `theirs`.
        names: of an expert's three matrices.
    """
    if isinstance(mixer, SwiGLU):
        yield from swiglu_links(mixer.d_ff, d, ours, theirs)
        return
    theirs = theirs if experts is None else experts
    yield from expert_links(mixer, d, ours, theirs, names=names)
    yield vector(f"{ours}router_bias", f"{theirs}gate.e_score_correction_bias", mixer.num_experts)
    if mixer.num_shared_experts:
        yield from swiglu_links(mixer.shared_width, d, f"{ours}shared.", f"{theirs}shared_experts.")
