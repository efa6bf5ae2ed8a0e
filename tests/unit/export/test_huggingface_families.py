"""Which published sizes of configs/families leave as which architecture of transformers."""

import importlib.util
import pathlib

import pytest

from mlt.errors import UserError
from mlt.export.huggingface.registry import write_config

FAMILIES = pathlib.Path(__file__).parents[3] / "configs" / "families"


def model_of(family, size):
    spec = importlib.util.spec_from_file_location(f"mlt_test_family_{family}", FAMILIES / f"{family}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SIZES[size].model


@pytest.mark.parametrize(
    ("family", "size", "architecture"),
    [
        ("falcon_h1", "0.5b", "falcon_h1"),
        ("falcon_h1", "7b", "falcon_h1"),
        ("griffin", "2b", "recurrent_gemma"),
        ("griffin", "9b", "recurrent_gemma"),
        ("jamba", "52b", "jamba"),
        ("kimi_linear", "48b", "kimi_linear"),
        ("mamba", "2.8b", "mamba"),
        ("mamba2", "2.7b", "mamba2"),
        ("nemotron_h", "8b", "nemotron_h"),
        ("qwen3", "8b", "qwen3"),
        ("qwen3_next", "80b", "qwen3_next"),
        ("transformer", "8b", "llama"),
        ("xlstm", "7b", "xlstm"),
        ("zamba2", "1.2b", "zamba2"),
        ("zamba2", "2.7b", "zamba2"),
    ],
)
def test_family_has_an_architecture(family, size, architecture):
    assert write_config(model_of(family, size))[0].model_type == architecture


def test_how_a_layer_is_run_does_not_decide_its_architecture():
    """A backend, and a way across sequence shards, are no settings of the exported model."""
    config = model_of("qwen3", "8b")
    block = config.stack.period[0]
    mixers = (block.mixers[0].replace(exchange="heads", kernel="reference"), *block.mixers[1:])
    stack = config.stack.replace(period=(block.replace(mixers=mixers),))
    assert write_config(config.replace(stack=stack))[1] == write_config(config)[1]


@pytest.mark.parametrize(
    "change", [{"global_balance_loss": 0.1}, {"balance_loss": 0.1}, {"z_loss": 0.1}, {"capacity_factor": 2.0}]
)
def test_what_only_training_reads_of_experts_does_not_decide_the_architecture(change):
    config = model_of("mixtral", "8x7b")
    block = config.stack.period[0]
    mixers = (block.mixers[0], block.mixers[1].replace(**change))
    changed = config.replace(stack=config.stack.replace(period=(block.replace(mixers=mixers),)))
    assert write_config(changed)[1] == write_config(config)[1]
    assert write_config(changed)[0].model_type == "mixtral"


def test_the_root_of_the_width_is_rounded_as_published():
    """RecurrentGemma scales embeddings by the root of the width in bfloat16: exact for 4096, 50.5 in place of 50.6 for 2560."""
    config = model_of("griffin", "2b")
    assert config.embed_scale == 50.5
    with pytest.raises(UserError, match=r"recurrent_gemma: embed_scale = 50\.59\d+, read back as 50\.5"):
        write_config(config.replace(embed_scale=2560**0.5))
