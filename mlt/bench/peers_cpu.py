"""Peers on a CPU: PyTorch's own ops, transformers, the plain forms of flash-linear-attention and mamba, MaxText."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from mlt.bench.peers import Arrays, Function, Missing, Peer, functions, module, source
from mlt.bench.rows import Row


def cpu_peers(kind: str, checkouts: pathlib.Path | None = None) -> list[Peer]:
    """Peers of a kind of row. `checkouts` may hold folders `maxtext` and `mamba_ssm` of those repositories."""

    def fla(folder: str, name: str) -> Any:
        module("torch")
        scope = {"torch": module("torch"), "F": module("torch.nn.functional"), "rearrange": module("einops").rearrange}
        return functions(source("fla", f"fla/ops/{folder}/naive.py"), (name,), scope)[name]

    def maxtext(name: str) -> Any:
        scope = {"jax": jax, "jnp": jnp, "Array": jax.Array}
        return functions(source("maxtext", "src/maxtext/models/qwen3.py", checkouts), (name,), scope)[name]

    def simple_gla(row: Row) -> Function:
        chunk = fla("simple_gla", "naive_chunk_simple_gla")
        return lambda a: _first(chunk(_heads(a["q"], row), _heads(a["k"], row), a["v"], a["log_decay"], chunk_size=64))

    def ssd_minimal(row: Row) -> Function:
        torch, einops = module("torch"), module("einops")
        scope = {"torch": torch, "F": module("torch.nn.functional"), "rearrange": einops.rearrange, "repeat": einops.repeat}
        path = source("mamba_ssm", "mamba_ssm/modules/ssd_minimal.py", checkouts)
        ssd = functions(path, ("segsum", "ssd_minimal_discrete"), scope)["ssd_minimal_discrete"]
        scale = row.sizes["K"] ** -0.5
        return lambda a: _first(ssd(a["v"], a["log_decay"], _heads(a["k"], row), _heads(a["q"], row) * scale, 64))

    def recurrent_gla(row: Row) -> Function:
        run = fla("gla", "naive_recurrent_gla")
        return lambda a: _first(run(a["q"], a["k"], a["v"], a["log_decay"]))

    def fla_delta(row: Row) -> Function:
        run = fla("gated_delta_rule", "naive_chunk_gated_delta_rule")
        return lambda a: _first(run(a["q"], a["k"], a["v"], a["log_decay"], a["beta"]))

    def qwen(row: Row) -> Function:
        run = module("transformers.models.qwen3_next.modeling_qwen3_next").torch_chunk_gated_delta_rule
        return lambda a: _first(run(a["q"], a["k"], a["v"], g=a["log_decay"], beta=a["beta"]))

    def maxtext_plain(row: Row) -> Function:
        run = maxtext("naive_jax_chunk_gated_delta_rule")
        return lambda a: _first(run(a["q"], a["k"], a["v"], a["log_decay"], a["beta"]))

    def maxtext_best(row: Row) -> Function:
        run = maxtext("jax_chunk_gated_delta_rule")
        return lambda a: _first(run(a["q"], a["k"], a["v"], a["log_decay"], a["beta"], compute_dtype=jnp.float32))

    def fla_kda(row: Row) -> Function:
        run = fla("kda", "naive_chunk_kda")
        return lambda a: _first(run(a["q"], a["k"], a["v"], a["log_decay"], a["beta"]))

    def hgrn(row: Row) -> Function:
        run = fla("hgrn", "naive_recurrent_hgrn")
        return lambda a: _first(run(a["b"], module("torch").log(a["a"])))

    def selective_scan_ref(row: Row) -> Function:
        einops = module("einops")
        scope = {
            "torch": module("torch"),
            "F": module("torch.nn.functional"),
            "rearrange": einops.rearrange,
            "repeat": einops.repeat,
        }
        path = source("mamba_ssm", "mamba_ssm/ops/selective_scan_interface.py", checkouts)
        run = functions(path, ("selective_scan_ref",), scope)["selective_scan_ref"]

        def call(a: Arrays) -> Any:
            x, step, B, C = (a[name].transpose(1, 2) for name in ("x", "step", "B", "C"))
            return run(x, step, a["A"], B, C, a["skip"]).transpose(1, 2)

        return call

    def sdpa(row: Row) -> Function:
        torch = module("torch")

        def run(a: Arrays) -> Any:
            q, k, v = (x.transpose(1, 2) for x in (a["q"], a["k"], a["v"]))
            mask = None
            if "segment_ids" in a:
                ids = a["segment_ids"]
                mask = ((ids[:, :, None] == ids[:, None, :]) & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril())[
                    :, None
                ]
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=row.sizes["K"] != row.sizes["N"]
            )
            return out.transpose(1, 2)

        return run

    def jax_nn(row: Row) -> Function:
        if row.documents:
            raise Missing("packed documents would need a (T, T) mask")
        return lambda a: jax.nn.dot_product_attention(a["q"], a["k"], a["v"], is_causal=True, implementation="xla")

    def expert_loop(row: Row) -> Function:
        torch = module("torch")

        def run(a: Arrays) -> Any:
            parts = torch.split(a["x"], a["group_sizes"].tolist())
            done = []
            for x, gate, up, down in zip(parts, a["gate"], a["up"], a["down"], strict=True):
                done.append((torch.nn.functional.silu(x @ gate) * (x @ up)) @ down)
            return torch.cat(done)

        return run

    def ragged(row: Row) -> Function:
        def run(a: Arrays) -> Any:
            gate, up = (jax.lax.ragged_dot(a["x"], a[name], a["group_sizes"]) for name in ("gate", "up"))
            return jax.lax.ragged_dot(jax.nn.silu(gate) * up, a["down"], a["group_sizes"])

        return run

    def full_logits(row: Row) -> Function:
        torch = module("torch")

        def run(a: Arrays) -> Any:
            logits = a["hidden"][0] @ a["unembedding"]
            return torch.nn.functional.cross_entropy(logits, a["labels"][0].long(), reduction="sum")

        return run

    def embedding_bag(row: Row) -> Function:
        bag = module("torch").nn.functional.embedding_bag
        return lambda a: bag(a["indices"][0].long(), a["table"], per_sample_weights=a["weights"][0], mode="sum")[None]

    def embedding(row: Row) -> Function:
        return lambda a: module("torch").nn.functional.embedding(a["indices"].long(), a["table"])

    def conv1d(row: Row) -> Function:
        torch = module("torch")

        def run(a: Arrays) -> Any:
            W, D = a["kernel"].shape
            x = torch.nn.functional.pad(a["x"].transpose(1, 2), (W - 1, 0))
            y = torch.nn.functional.conv1d(x, a["kernel"].t()[:, None].contiguous(), groups=D)
            return torch.nn.functional.silu(y).transpose(1, 2)

        return run

    ssd = [Peer("fla naive chunk simple GLA", "torch", simple_gla), Peer("mamba ssd_minimal", "torch", ssd_minimal)]
    delta = [
        Peer("fla naive chunk gated delta", "torch", fla_delta),
        Peer("transformers Qwen3-Next torch_chunk", "torch", qwen),
        Peer("MaxText naive_jax_chunk", "jax", maxtext_plain),
        Peer("MaxText jax_chunk", "jax", maxtext_best),
    ]
    found = {
        "ssd": ssd,
        "simple_gla": ssd,
        "gla": [Peer("fla naive recurrent GLA", "torch", recurrent_gla)],
        "gated_delta": delta,
        "kda": [Peer("fla naive chunk KDA", "torch", fla_kda)],
        "rg_lru": [Peer("fla naive recurrent HGRN", "torch", hgrn)],
        "mamba1": [Peer("mamba selective_scan_ref", "torch", selective_scan_ref)],
        "attention": [Peer("torch SDPA", "torch", sdpa), Peer("jax.nn.dot_product_attention", "jax", jax_nn)],
        "moe": [Peer("torch loop over experts", "torch", expert_loop), Peer("lax.ragged_dot", "jax", ragged)],
        "cross_entropy": [Peer("torch full logits", "torch", full_logits)],
        "pkm": [Peer("torch embedding_bag", "torch", embedding_bag)],
        "engram": [Peer("torch embedding", "torch", embedding)],
        "causal_conv": [Peer("torch conv1d", "torch", conv1d)],
    }.get(kind, [])
    recurrences = ("ssd", "simple_gla", "gla", "gated_delta", "kda")
    return [_unpacked_only(peer) if kind in recurrences else peer for peer in found]


def _unpacked_only(peer: Peer) -> Peer:
    def make(row: Row) -> Function:
        if row.documents:
            raise Missing("it has no document boundaries")
        return peer.make(row)

    return Peer(peer.name, peer.framework, make)


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _heads(x: Any, row: Row) -> Any:
    """(B, T, Hk, K) to (B, T, H, K), for peers without groups."""
    times = row.sizes["H"] // row.sizes["Hk"]
    return x if times == 1 else x.repeat_interleave(times, dim=2)
