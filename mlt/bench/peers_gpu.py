"""Peers' kernels on a GPU, from what is installed: flash-linear-attention, FlashQLA, mamba_ssm, mLSTM kernels, flash-attn,
torch, tokamax, JAX's own. Nothing here has run on a GPU yet: a wrong call costs its row and says so."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlt.bench.peers import Arrays, Function, Missing, Peer, module
from mlt.bench.rows import Row

PACKAGES = (
    "torch",
    "fla",
    "flash_qla",
    "mamba_ssm",
    "mlstm_kernels",
    "flash_attn",
    "flash_attn_interface",
    "causal_conv1d",
    "tokamax",
)
"""Distributions looked for, by import name."""


def gpu_peers(kind: str) -> list[Peer]:
    """Peers of a kind of row."""
    return _PEERS.get(kind, [])


def _torch(name: str, make: Callable[[Row], Function]) -> Peer:
    return Peer(name, "torch", make)


def _lengths(a: Arrays, row: Row) -> tuple[Arrays, Any]:
    """Arguments with rows and documents joined into one row, and the cumulative lengths of the documents."""
    torch = module("torch")
    if row.documents is None:
        return a, None
    B = row.sizes["B"]
    ends = torch.tensor([0, *row.documents] * 1, device=a["q"].device).cumsum(0)
    whole = int(ends[-1])
    starts = torch.cat([ends[:-1] + b * whole for b in range(B)] + [torch.tensor([B * whole], device=ends.device)])
    joined = {name: x.reshape(1, -1, *x.shape[2:]) for name, x in a.items() if name != "segment_ids"}
    return joined, starts.to(torch.int32)


def _fla(path: str, names: tuple[str, ...], *, repeat: bool = False) -> Callable[[Row], Function]:
    """fla's `path.function` on q, k, v and `names`; `repeat` the query and key heads it has no groups for."""
    package, _, function = path.rpartition(".")

    def make(row: Row) -> Function:
        run = getattr(module(package), function)
        times = row.sizes["H"] // row.sizes["Hk"]

        def call(a: Arrays) -> Any:
            a, starts = _lengths(a, row)
            q, k = (x.repeat_interleave(times, dim=2) if repeat and times > 1 else x for x in (a["q"], a["k"]))
            extra = {} if starts is None else {"cu_seqlens": starts.long()}
            out = run(q, k, a["v"], **{key: a[name].float() for key, name in zip(("g", "beta"), names, strict=False)}, **extra)[0]
            return out.reshape(row.sizes["B"], row.sizes["T"], *out.shape[2:])

        return call

    return make


def _mamba2(row: Row) -> Function:
    """Its steps are both decay and write strength: values are divided by them first, one pass over v more than it needs."""
    torch = module("torch")
    run = module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def call(a: Arrays) -> Any:
        step = -a["log_decay"]
        minus_one = -torch.ones(row.sizes["H"], device=step.device)
        x = (a["v"] / step[..., None]).to(a["v"].dtype)
        return run(x, step, minus_one, a["k"], a["q"] * row.sizes["K"] ** -0.5, row.sizes["C"], seq_idx=a.get("segment_ids"))

    return call


def _mlstm(row: Row) -> Function:
    torch = module("torch")
    run = module("mlstm_kernels.torch.chunkwise.triton_xl_chunk").mlstm_chunkwise__xl_chunk

    def call(a: Arrays) -> Any:
        q, k, v, i, g = (a[name].transpose(1, 2).contiguous() for name in ("q", "k", "v", "log_input", "log_decay"))
        forget = g - torch.log(-torch.expm1(g))  # its gate before the log-sigmoid
        return run(q=q, k=k, v=v, i=i, f=forget, chunk_size=row.sizes["C"]).transpose(1, 2)

    return call


def _selective_scan(row: Row) -> Function:
    run = module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def call(a: Arrays) -> Any:
        if "segment_ids" in a:
            raise Missing("it has no document boundaries")
        x, step, B, C = (a[name].transpose(1, 2).contiguous() for name in ("x", "step", "B", "C"))
        return run(x, step, a["A"].float(), B, C, a["skip"].float()).transpose(1, 2)

    return call


def _hgrn(row: Row) -> Function:
    run, torch = module("fla.ops.hgrn").chunk_hgrn, module("torch")
    return lambda a: run(a["b"], torch.log(a["a"].float()).to(a["b"].dtype))[0]


def _accelerated_scan(row: Row) -> Function:
    run = module("accelerated_scan.warp").scan
    return lambda a: run(a["a"].transpose(1, 2).contiguous(), a["b"].transpose(1, 2).contiguous()).transpose(1, 2)


def _sdpa(row: Row) -> Function:
    torch = module("torch")

    def call(a: Arrays) -> Any:
        if row.documents:
            raise Missing("packed documents would need a (T, T) mask")
        q, k, v = (a[name].transpose(1, 2) for name in ("q", "k", "v"))
        grouped = row.sizes["K"] != row.sizes["N"]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    return call


def _flash(package: str) -> Callable[[Row], Function]:
    def make(row: Row) -> Function:
        flash = module(package)

        def call(a: Arrays) -> Any:
            a, starts = _lengths(a, row)
            if starts is None:
                out = flash.flash_attn_func(a["q"], a["k"], a["v"], causal=True)
            else:
                q, k, v = (a[name][0] for name in ("q", "k", "v"))
                longest = max(row.documents or ())
                out = flash.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=True)
            out = out[0] if isinstance(out, tuple) else out
            return out.reshape(row.sizes["B"], row.sizes["T"], *out.shape[-2:])

        return call

    return make


def _jax_attention(implementation: str) -> Callable[[Row], Function]:
    def make(row: Row) -> Function:
        if row.documents:
            raise Missing("packed documents would need a (T, T) mask")
        run = jax.nn.dot_product_attention if implementation != "tokamax" else module("tokamax").dot_product_attention
        options: Any = {} if implementation == "tokamax" else {"implementation": implementation}
        return lambda a: run(a["q"], a["k"], a["v"], is_causal=True, **options)

    return make


def _gated(product: Callable[[Any, Any, Any], Any], silu: Callable[[Any], Any]) -> Function:
    def call(a: Arrays) -> Any:
        sizes = a["group_sizes"]
        return product(silu(product(a["x"], a["gate"], sizes)) * product(a["x"], a["up"], sizes), a["down"], sizes)

    return call


def _torch_grouped(row: Row) -> Function:
    torch = module("torch")
    grouped = getattr(torch, "_grouped_mm", None) or getattr(torch.nn.functional, "grouped_mm", None)
    if grouped is None:
        raise Missing("this torch has no grouped_mm")
    return _gated(lambda x, w, n: grouped(x, w, offs=n.cumsum(0).to(torch.int32)), torch.nn.functional.silu)


def _torch_loop(row: Row) -> Function:
    torch = module("torch")

    def product(x: Any, w: Any, sizes: Any) -> Any:
        return torch.cat([part @ weight for part, weight in zip(torch.split(x, sizes.tolist()), w, strict=True)])

    return _gated(product, torch.nn.functional.silu)


def _ragged(package: str) -> Callable[[Row], Function]:
    def make(row: Row) -> Function:
        run = jax.lax.ragged_dot if package == "jax" else module(package).ragged_dot
        return _gated(lambda x, w, n: run(x, w, n), jax.nn.silu)

    return make


def _torch_loss(row: Row) -> Function:
    torch = module("torch")

    def call(a: Arrays) -> Any:
        logits = (a["hidden"][0] @ a["unembedding"]).float()
        return torch.nn.functional.cross_entropy(logits, a["labels"][0].long(), reduction="sum")

    return call


def _fla_loss(row: Row) -> Function:
    run = module("fla.modules.fused_linear_cross_entropy").fused_linear_cross_entropy_loss
    return lambda a: run(a["hidden"][0], a["labels"][0].long(), a["unembedding"].t().contiguous(), reduction="sum")


def _bag(row: Row) -> Function:
    bag = module("torch").nn.functional.embedding_bag
    return lambda a: bag(a["indices"][0].long(), a["table"], per_sample_weights=a["weights"][0], mode="sum")[None]


def _embedding(row: Row) -> Function:
    return lambda a: module("torch").nn.functional.embedding(a["indices"].long(), a["table"])


def _conv(row: Row) -> Function:
    run = module("causal_conv1d").causal_conv1d_fn
    return lambda a: run(a["x"].transpose(1, 2), a["kernel"].t().contiguous(), activation="silu").transpose(1, 2)


def _lax_conv(row: Row) -> Function:
    W = row.sizes["W"]

    def call(a: Arrays) -> Any:
        x = jnp.pad(a["x"], ((0, 0), (W - 1, 0), (0, 0)))
        kernel = a["kernel"][:, None]
        dims = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHC", "HIO", "NHC"))
        y = jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=dims, feature_group_count=x.shape[2])
        return jax.nn.silu(y)

    return call


_SCALAR = _torch("fla chunk_simple_gla", _fla("fla.ops.simple_gla.chunk_simple_gla", ("log_decay",), repeat=True))

_PEERS: dict[str, list[Peer]] = {
    "ssd": [_torch("mamba_ssm mamba_chunk_scan_combined", _mamba2), _SCALAR],
    "simple_gla": [
        _SCALAR,
        _torch("fla fused_chunk_simple_gla", _fla("fla.ops.simple_gla.fused_chunk_simple_gla", ("log_decay",))),
    ],
    "gla": [_torch("fla chunk_gla", _fla("fla.ops.gla.chunk_gla", ("log_decay",), repeat=True))],
    "gated_delta": [
        _torch("fla chunk_gated_delta_rule", _fla("fla.ops.gated_delta_rule.chunk_gated_delta_rule", ("log_decay", "beta"))),
        _torch("FlashQLA chunk_gated_delta_rule", _fla("flash_qla.chunk_gated_delta_rule", ("log_decay", "beta"))),
    ],
    "kda": [_torch("fla chunk_kda", _fla("fla.ops.kda.chunk_kda", ("log_decay", "beta")))],
    "mlstm": [_torch("mlstm_kernels xl_chunk", _mlstm)],
    "rg_lru": [_torch("fla chunk_hgrn", _hgrn), _torch("accelerated_scan warp", _accelerated_scan)],
    "mamba1": [_torch("mamba_ssm selective_scan_fn", _selective_scan)],
    "attention": [
        _torch("torch SDPA", _sdpa),
        _torch("flash_attn", _flash("flash_attn")),
        _torch("flash_attn 3", _flash("flash_attn_interface")),
        Peer("jax.nn cudnn", "jax", _jax_attention("cudnn")),
        Peer("jax.nn xla", "jax", _jax_attention("xla")),
        Peer("tokamax attention", "jax", _jax_attention("tokamax")),
    ],
    "moe": [
        _torch("torch grouped_mm", _torch_grouped),
        _torch("torch loop over experts", _torch_loop),
        Peer("lax.ragged_dot", "jax", _ragged("jax")),
        Peer("tokamax ragged_dot", "jax", _ragged("tokamax")),
    ],
    "cross_entropy": [_torch("torch full logits", _torch_loss), _torch("fla fused linear cross-entropy", _fla_loss)],
    "pkm": [_torch("torch embedding_bag", _bag)],
    "engram": [_torch("torch embedding", _embedding)],
    "causal_conv": [_torch("causal_conv1d", _conv), Peer("lax depthwise convolution", "jax", _lax_conv)],
}
