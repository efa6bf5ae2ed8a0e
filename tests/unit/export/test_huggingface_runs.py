"""`mlt import` and `mlt export --format huggingface`: a run between two model directories, and what they refuse."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mlt.config.load import load_config
from mlt.config.run import RunConfig
from mlt.errors import UserError
from mlt.export.huggingface.exports import export_huggingface
from mlt.export.huggingface.imports import import_run
from mlt.export.huggingface.registry import all_architectures, read_config, write_config
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.short_conv import ShortConv
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.train.load import load_model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "vocab_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "tie_word_embeddings": True,
    "rope_theta": 500.0,
    "max_position_embeddings": 32,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def source(tmp_path):
    """A model directory of a two-layer Llama in an old file's spelling, with a tokenizer of words."""
    directory = tmp_path / "llama"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA))
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (12, 16), "model.norm.weight": (16,)}
    for layer in range(2):
        theirs = f"model.layers.{layer}."
        shapes |= {f"{theirs}{name}_layernorm.weight": (16,) for name in ("input", "post_attention")}
        shapes |= {f"{theirs}self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"}
        shapes |= {f"{theirs}mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
        shapes |= {f"{theirs}mlp.down_proj.weight": (16, 24)}
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    tensors["model.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, directory / "model.safetensors")
    words = ["<s>", "</s>", *"abcdefghij"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:2])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return directory


def test_there_and_back(source, tmp_path):
    run, target = tmp_path / "run", tmp_path / "export"
    import_run(source, run, sets=["train.steps=7"])
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (source / name).rename(source / f"{name}.gone")  # the run stands on its own
    config, _, step = load_model(run)
    assert (step, config.train.steps, config.data.sequence_length, config.data.tokenizer.eos_id) == (0, 7, 32, 1)
    export_huggingface(run, target)
    theirs = load_file(source / "model.safetensors.gone")
    del theirs["model.rotary_emb.inv_freq"]
    ours = load_file(target / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    written = json.loads((target / "config.json").read_text())
    assert (written["architectures"], written["eos_token_id"]) == (["LlamaForCausalLM"], 1)
    assert read_config(written, "written") == read_config(LLAMA, "given")


def test_shared_weights_go_there_and_back(source, tmp_path):
    """Zamba2's transformers lie where they are first used, and belong to no layer of ours."""
    values = {
        "model_type": "zamba2",
        **{name: LLAMA[name] for name in ("hidden_size", "vocab_size", "num_attention_heads", "intermediate_size")},
        "layers_block_type": ["linear_attention", "hybrid", "hybrid", "hybrid"],
        "num_mem_blocks": 2,
        "adapter_rank": 2,
        "n_mamba_heads": 2,
        "mamba_d_state": 4,
    }
    config = read_config(values, "given")
    rng = np.random.default_rng(0)
    links = all_architectures()["zamba2"].links(config)
    theirs = {name: rng.standard_normal(link.shape, np.float32) for link in links for name in link.theirs}
    assert len([name for name in theirs if name.endswith("q_proj.weight")]) == 2
    (source / "config.json").write_text(json.dumps(values))
    save_file(theirs, source / "model.safetensors")
    import_run(source, tmp_path / "run")
    export_huggingface(tmp_path / "run", tmp_path / "export")
    ours = load_file(tmp_path / "export" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_every_refused_setting_is_listed_and_nothing_written(source, tmp_path):
    values = {
        **LLAMA,
        "hidden_act": "gelu",
        "clip_qkv": 8.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "use_cache": False,
    }
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        import_run(source, tmp_path / "run")
    message = str(caught.value)
    for text in ("hidden_act = 'gelu'", "clip_qkv = 8.0", "rope_type = 'dynamic'"):
        assert text in message
    assert "use_cache" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' has no map; there are bamba"),
        ({"num_hidden_layers": 3}, "missing   model.layers.2.input_layernorm.weight (16,)"),
        ({"num_hidden_layers": 1}, "unknown   model.layers.1.input_layernorm.weight (16,)"),
        ({"intermediate_size": 20}, "mlp.up_proj.weight is (24, 16), its config says (20, 16)"),
        ({"hidden_size": None}, "has no hidden_size"),
    ],
)
def test_what_does_not_fit_is_named(source, tmp_path, change, wanted):
    (source / "config.json").write_text(json.dumps({**LLAMA, **change}))
    with pytest.raises(UserError) as caught:
        import_run(source, tmp_path / "run")
    assert wanted in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_weights_decide_the_model(source, tmp_path):
    with pytest.raises(UserError, match=r"--set may not change what the weights compute: logit_softcap = 3\.0, not None"):
        import_run(source, tmp_path / "run", sets=["model.logit_softcap=3.0"])


def test_a_run_is_not_overwritten(source, tmp_path):
    import_run(source, tmp_path / "run")
    before = load_config(tmp_path / "run", root=RunConfig)
    with pytest.raises(UserError, match="holds a run already"):
        import_run(source, tmp_path / "run", sets=["train.steps=3"])
    assert load_config(tmp_path / "run", root=RunConfig) == before


def test_export_says_what_each_architecture_lacks():
    llama = read_config(LLAMA, "given")
    with pytest.raises(UserError) as caught:
        write_config(llama.replace(logit_softcap=5.0))
    message = str(caught.value)
    assert "llama: logit_softcap = 5.0, read back as None" in message
    assert all(f"  {name}: " in message for name in all_architectures())
    odd = LMConfig(d_model=8, vocab_size=16, stack=Stack(head=(Block(mixers=(ShortConv(), SwiGLU(d_ff=8))),)))
    with pytest.raises(UserError, match=r"llama: a layer is \['ShortConv', 'SwiGLU'\], not with Attention at place 0"):
        write_config(odd)


def test_bfloat16_weights_are_read_exactly(source, tmp_path):
    from safetensors.flax import save_file as save_jax

    theirs = {name: jax.numpy.asarray(a, "bfloat16") for name, a in load_file(source / "model.safetensors").items()}
    save_jax(theirs, source / "model.safetensors")
    import_run(source, tmp_path / "run")
    model = load_model(tmp_path / "run")[1]
    np.testing.assert_array_equal(model.embed.table[...], np.asarray(theirs["model.embed_tokens.weight"], np.float32))
