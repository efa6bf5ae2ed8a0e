"""Write the parity goldens: what transformers computes on the CPU for a small model of each architecture.

    python tools/parity_goldens.py [NAME ...]

needs torch 2.13.0 and transformers (see docs/parity.md). Weights are not stored: both sides make them from the names and
shapes of the tensors on disk, by `weights` below, so that a golden is its config.json, two documents and their logits.
"""

import contextlib
import json
import math
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent.parent / "tests" / "parity" / "golden"
LENGTHS = (13, 18)

_BASE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "rope_theta": 1000.0}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_BASE, **_ATTENTION, "head_dim": 16}),
    "llama_biased_scaled": (
        "llama",
        {
            **_BASE,
            **_ATTENTION,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {**_LLAMA3, "rope_theta": 1000.0, "original_max_position_embeddings": 16},
        },
    ),
    "qwen3": (
        "qwen3",
        {
            **_BASE,
            **_ATTENTION,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3_yarn": ("qwen3", {**_BASE, **_ATTENTION, "head_dim": 16, "rope_parameters": _YARN, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {**_BASE, **_ATTENTION, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_BASE, **_ATTENTION, **_EXPERTS, "head_dim": 16, "mlp_only_layers": [0], "norm_topk_prob": False},
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **_BASE,
            **_ATTENTION,
            **_EXPERTS,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "shared_expert_intermediate_size": 20,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
        },
    ),
    "mamba": ("mamba", {**_BASE, "state_size": 8, "time_step_rank": 3, "tie_word_embeddings": False}),
    "jamba": (
        "jamba",
        {
            **_BASE,
            **{key: value for key, value in _ATTENTION.items() if key != "rope_theta"},
            "num_hidden_layers": 4,
            "num_experts": 4,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 6,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**_BASE, **_ATTENTION, "num_hidden_layers": 3, "lru_width": 48, "attention_window_size": 5, "logits_soft_cap": 20.0},
    ),
    "mamba2": (
        "mamba2",
        {
            **_BASE,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 2,
            "expand": 2,
            "chunk_size": 8,
            "time_step_limit": [0.3, 1.0],
        },
    ),
    "zamba2": (
        "zamba2",
        {
            **_BASE,
            **_ATTENTION,
            "num_hidden_layers": 5,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"],
            "num_mem_blocks": 2,
            "adapter_rank": 4,
            "use_mem_rope": True,
            "n_mamba_heads": 4,
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "time_step_min": 0.3,
            "chunk_size": 8,
        },
    ),
    "zamba2_attention_adapter": (
        "zamba2",
        {
            **_BASE,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
            "n_mamba_heads": 4,
            "mamba_d_state": 8,
            "chunk_size": 8,
        },
    ),
    "bamba": ("bamba", {**_BASE, **_ATTENTION, **_MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_BASE,
            **_ATTENTION,
            **_MAMBA,
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "position_embedding_type": "rope",
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_BASE,
            "num_hidden_layers": 3,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "kv_lora_rank": 16,
            "q_lora_rank": 20,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **_BASE,
            **_ATTENTION,
            **_MAMBA,
            "mamba_d_ssm": 64,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "embedding_multiplier": 2.5,
            "lm_head_multiplier": 0.6,
            "key_multiplier": 0.7,
            "attention_in_multiplier": 1.3,
            "attention_out_multiplier": 0.8,
            "ssm_in_multiplier": 1.2,
            "ssm_out_multiplier": 0.7,
            "mlp_multipliers": [0.9, 0.6],
            "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        },
    ),
    "falcon_h1_without_norm": ("falcon_h1", {**_BASE, **_ATTENTION, **_MAMBA, "mamba_d_ssm": 64, "attention_bias": True}),
    "nemotron_h": (
        "nemotron_h",
        {
            **{key: value for key, value in _BASE.items() if key != "num_hidden_layers"},
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "time_step_min": 0.3,
        },
    ),
    "diffllama": ("diffllama", {**_BASE, **_ATTENTION, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}),
    "xlstm": (
        "xlstm",
        {**_BASE, "num_heads": 4, "chunk_size": 8, "ffn_round_up_to_multiple_of": 8, "autocast_kernel_dtype": "float32"},
    ),
    "kimi_linear": (
        "kimi_linear",
        {
            **_BASE,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 12,
            "kv_lora_rank": 16,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
        },
    ),
}
"""Name of the golden -> (model_type, config)."""

IN_FLOAT64 = frozenset(["qwen3_next"])
"""Goldens whose logits are computed in float64, with what rounding does to them: see `rounding`."""


def golden_path(name: str) -> Path:
    return FOLDER / f"{name}.npz"


def weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Float32 tensors far from any default initialization, the same on every machine.

    Uniform draws of 24 bits from a counter-based generator, scaled so that a matrix keeps the size of its input.
    """
    return {name: _draw(name, tuple(shape), seed) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    raw = np.random.Philox(key=seed * 2**32 + zlib.crc32(name.encode())).random_raw(math.prod(shape))
    unit = (raw >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0
    leaf = name.rsplit(".", 1)[-1]
    matrix = len(shape) > 1
    center, spread = 0.0, math.sqrt(3.0 / shape[-1]) if matrix else 0.4
    if "embed" in name:
        spread = 0.6
    elif "conv1d" in name and matrix:
        spread = 0.8
    elif leaf in ("D", "weight") and not matrix:
        center, spread = 1.0, 0.5
    elif leaf == "e_score_correction_bias":
        spread = 0.2
    elif leaf == "A_log":
        center, spread = 0.5, 1.0
    elif leaf == "dt_bias" or name.endswith("dt_proj.bias"):
        center, spread = -0.5, 1.0
    elif leaf == "recurrent_param":
        center, spread = -3.0, 1.5
    return (center + spread * unit).astype(np.float32).reshape(shape)


def documents(vocab_size: int, seed: int) -> list[np.ndarray]:
    """Two documents of token ids."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    return [rng.integers(3, vocab_size, length) for length in LENGTHS]


def saved_form(kind: str, fields: dict[str, Any], directory: Path) -> dict[str, tuple[int, ...]]:
    """Save a fresh model of a config as transformers does; names and shapes of its tensors on disk."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).save_pretrained(directory)
    with safe_open(directory / "model.safetensors", "np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def load(directory: Path) -> Any:
    """The model that transformers reads from a directory, in float32; every tensor must be used."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    left = {key: value for key, value in info.items() if value}
    if left:
        raise RuntimeError(f"{directory}: transformers reports {left}")
    return model.eval()


def logits(model: Any, ids: np.ndarray, **more: Any) -> np.ndarray:
    """(T, V) in the model's type."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids)[None], use_cache=False, **more).logits[0].numpy()


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Whatever asks torch for float32 gets float64: models of transformers compute norms, decays and softmax in float32."""
    import torch

    single = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = single
        torch.set_default_dtype(torch.float32)


def reference(model: Any, parts: list[np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits (T, V) of the documents, each alone, and what float32 may add to their error at each token (T,).

    For most goldens nothing: the first are float32 then. For those of IN_FLOAT64 the second is the largest change, in exact
    arithmetic, that eight draws of a relative error of up to 2^-24 on every weight, as one rounding to float32 makes, have
    on the token's logits. No computation in float32 can be held to less. It turns the model into one of float64.
    """
    import torch

    if name not in IN_FLOAT64:
        alone = np.concatenate([logits(model, part) for part in parts])
        return alone, np.zeros(len(alone))
    model.set_experts_implementation("eager")
    model.double()
    exact = [parameter.detach().clone() for parameter in model.parameters()]
    with float64():
        alone, largest = np.concatenate([logits(model, part) for part in parts]), np.zeros(sum(map(len, parts)))
        for draw in range(8):
            generator = torch.Generator().manual_seed(draw)
            for parameter, value in zip(model.parameters(), exact, strict=True):
                error = 2 * torch.rand(value.shape, generator=generator) - 1
                parameter.data = value * (1 + 2**-24 * error)
            rounded = np.concatenate([logits(model, part) for part in parts])
            largest = np.maximum(largest, np.abs(rounded - alone).max(-1))
    return alone, largest


def packed_logits(model: Any, parts: list[np.ndarray]) -> np.ndarray | None:
    """(T, V) of the documents in one row, told apart by their positions and cumulative lengths.

    None where transformers refuses that without CUDA kernels.
    """
    import torch

    positions = np.concatenate([np.arange(len(part)) for part in parts])
    index = np.concatenate([np.full(len(part), number, np.int32) for number, part in enumerate(parts)])
    ends = torch.tensor([0, *np.cumsum([len(part) for part in parts])], dtype=torch.int32)
    longest = max(map(len, parts))
    more = {
        "position_ids": torch.from_numpy(positions)[None],
        "seq_idx": torch.from_numpy(index)[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    try:
        return logits(model, np.concatenate(parts), **more)
    except ValueError as error:
        if "can't keep packed sequences apart" not in str(error):
            raise
        return None


def make(name: str, seed: int) -> dict[str, np.ndarray]:
    """Everything that a golden holds."""
    import torch
    import transformers
    from safetensors.numpy import save_file

    kind, fields = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        shapes = saved_form(kind, fields, directory)
        save_file(weights(shapes, seed), directory / "model.safetensors", metadata={"format": "pt"})
        model = load(directory)
        config = (directory / "config.json").read_text()
    parts = documents(fields["vocab_size"], seed)
    packed = packed_logits(model, parts)
    apart = np.concatenate([logits(model, part) for part in parts])
    wanted, rounding = reference(model, parts, name)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    more = {"rounding": rounding, "float32_error": np.abs(apart - wanted).max()} if name in IN_FLOAT64 else {}
    return more | {
        "config": np.array(config),
        "shapes": np.array(json.dumps(shapes)),
        "seed": np.array(seed),
        "versions": np.array(json.dumps(versions)),
        "ids": np.concatenate(parts),
        "lengths": np.array(LENGTHS),
        "logits": wanted,
        "packed_error": np.array(np.nan if packed is None else np.abs(packed - apart).max()),
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in sys.argv[1:] or CASES:
        golden = make(case, seed=1)
        np.savez_compressed(golden_path(case), **golden)
        size, largest = golden_path(case).stat().st_size, np.abs(golden["logits"]).max()
        print(f"{case:<24}{size:>8} bytes  largest logit {largest:6.2f}  packed by transformers: {golden['packed_error']:.1e}")
        if case in IN_FLOAT64:
            print(f"{'':<24}transformers' float32 is {golden['float32_error']:.1e} off its float64")
