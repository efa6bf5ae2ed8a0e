"""Settings of other libraries' files that no config of ours means are refused by name; equal models are found equal."""

import pytest

from mlt.errors import UserError
from mlt.export.huggingface.registry import read_config, write_config
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.mamba import Mamba
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack

SIZES = {"hidden_size": 32, "vocab_size": 16, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
MAMBA = {"model_type": "mamba", **{name: SIZES[name] for name in ("hidden_size", "vocab_size", "num_hidden_layers")}}
JAMBA = {"model_type": "jamba", **SIZES, "num_hidden_layers": 6, "mamba_dt_rank": 3}
GEMMA = {"model_type": "recurrent_gemma", **SIZES}
ZAMBA = {
    "model_type": "zamba2",
    **SIZES,
    "layers_block_type": ["mamba", "hybrid", "hybrid"],
    "n_mamba_heads": 4,
    "num_mem_blocks": 2,
}
MOE = {**SIZES, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
DEEPSEEK = {"model_type": "deepseek_v3", **MOE, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}


@pytest.mark.parametrize(
    ("values", "change", "named"),
    [
        (MAMBA, {"use_bias": True}, "use_bias = True"),
        (MAMBA, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (MAMBA, {"intermediate_size": 65}, "intermediate_size = 65"),
        (JAMBA, {"mamba_proj_bias": True}, "mamba_proj_bias = True"),
        (JAMBA, {"sliding_window": 8}, "sliding_window = 8"),
        (JAMBA, {"attention_bias": True}, "attention_bias = True"),
        (JAMBA, {"mamba_inner_layernorms": False}, "mamba_inner_layernorms = False"),
        (GEMMA, {"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        (GEMMA, {"block_types": ["recurrent", "full"]}, "block_types = 'full'"),
        (GEMMA, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.rope_type = 'linear'"),
        (ZAMBA, {"use_shared_attention_adapter": True, "num_key_value_heads": 2}, "num_key_value_heads = 2"),
        (ZAMBA, {"add_bias_linear": True}, "add_bias_linear = True"),
        (ZAMBA, {"use_long_context": True}, "use_long_context = True"),
        (ZAMBA, {"layers_block_type": ["mamba", "moe", "hybrid"]}, "layers_block_type = 'moe'"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        (DEEPSEEK, {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"model_type": "mixtral", **SIZES}, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"model_type": "qwen3_moe", **MOE, "num_experts": 4}, {"norm_topk": "yes"}, "norm_topk = 'yes': not known"),
    ],
)
def test_a_setting_that_cannot_be_expressed_is_named(values, change, named):
    read_config(values, "given")
    with pytest.raises(UserError) as caught:
        read_config({**values, **change}, "given")
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("attends", "routes"), [((3, 2), (2, 1)), ((4, 2), (2, 0)), ((7, 6), (7, 6)), ((6, 5), (1, 0)), ((3, 0), (6, 0))]
)
def test_periods_of_jamba_go_there_and_back(attends, routes):
    """(period, offset) of attention and of experts, those that no layer or one layer has among them."""
    period, offset = (f"{name}_layer_{what}" for name in ("attn",) for what in ("period", "offset"))
    values = {**JAMBA, period: attends[0], offset: attends[1]}
    values |= {"expert_layer_period": routes[0], "expert_layer_offset": routes[1]}
    config = read_config(values, "given")
    architecture, fields = write_config(config, "jamba")
    assert read_config({"model_type": architecture.model_type, **fields}, "written") == config


def test_defaults_and_spelled_out_sizes_are_one_model():
    block = Block(mixers=(Mamba(),), norm_eps=1e-5)
    config = LMConfig(d_model=32, vocab_size=16, stack=Stack(period=(block,), repeats=2), norm_eps=1e-5)
    architecture, fields = write_config(config)
    assert (architecture.model_type, fields["expand"], fields["time_step_rank"]) == ("mamba", 2, 2)


def test_names_of_shared_blocks_do_not_matter_but_their_order_does():
    layers = read_config({**ZAMBA, "layers_block_type": ["hybrid"] * 3}, "given").stack.layers()

    def named(names):
        blocks = [block.replace(mixers=(block.mixers[0].replace(name=n),)) for block, n in zip(layers, names, strict=True)]
        return LMConfig(d_model=32, vocab_size=16, stack=Stack(head=tuple(blocks)), tie_embeddings=True, norm_eps=1e-5)

    assert [block.mixers[0].name for block in layers] == ["shared_0", "shared_1", "shared_0"]
    for names, count in ((("b", "a", "b"), 2), (("x", "x", "x"), 1), (("c", "a", "b"), 3)):
        architecture, fields = write_config(named(names))
        assert (architecture.model_type, fields["num_mem_blocks"]) == ("zamba2", count)
    with pytest.raises(UserError, match="zamba2: layer 1: "):
        write_config(named(("a", "a", "b")))


def test_a_gated_gelu_is_not_taken_for_a_silu():
    values = {"model_type": "llama", **SIZES}
    config = read_config(values, "given")
    block = config.stack.layers()[0]
    gelu = block.replace(mixers=(block.mixers[0], SwiGLU(d_ff=48, activation="gelu_tanh")))
    with pytest.raises(UserError, match=r"llama: layer 0: .*gelu_tanh"):
        write_config(config.replace(stack=Stack(period=(gelu,), repeats=2)))
