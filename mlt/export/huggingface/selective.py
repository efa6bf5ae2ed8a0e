"""Mamba as transformers spells it: fused projections, one per mixer, with or without the norms of Jamba."""

from collections.abc import Iterator

from mlt.export.huggingface.links import Link, depthwise_conv, fused_linear, linear, vector
from mlt.mixers.sequence.mamba import Mamba


def mamba_links(m: Mamba, d: int, ours: str, theirs: str) -> Iterator[Link]:
    """Input projection (x, gate), convolution, projection into (step, B, C), and the rest."""
    inner, rank, n = m.channels(d), m.rank(d), m.state_dim
    yield fused_linear(f"{theirs}in_proj.weight", d, ((f"{ours}value.kernel", inner), (f"{ours}gate.kernel", inner)))
    yield depthwise_conv(f"{theirs}conv1d.weight", m.conv_width, ((f"{ours}conv.kernel", inner),))
    if m.conv_bias:
        yield vector(f"{ours}conv.bias", f"{theirs}conv1d.bias", inner)
    columns = ((f"{ours}step_in.kernel", rank), (f"{ours}write.kernel", n), (f"{ours}read.kernel", n))
    yield fused_linear(f"{theirs}x_proj.weight", inner, columns)
    if m.inner_norm:
        for mine, other, size in (("step", "dt", rank), ("write", "b", n), ("read", "c", n)):
            yield vector(f"{ours}{mine}_norm.scale", f"{theirs}{other}_layernorm.weight", size)
    yield linear(f"{ours}step_out.kernel", f"{theirs}dt_proj.weight", inner, rank)
    yield vector(f"{ours}dt_bias", f"{theirs}dt_proj.bias", inner)
    yield vector(f"{ours}A_log", f"{theirs}A_log", inner, n)
    yield vector(f"{ours}skip", f"{theirs}D", inner)
    yield linear(f"{ours}output.kernel", f"{theirs}out_proj.weight", d, inner)


def rank_of(value: int | str) -> int | None:
    """The width of the step's projection; "auto" is our default too."""
    return None if value == "auto" else int(value)
