"""`mlt import`: a run directory whose step 0 is a model of transformers."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mlt.checkpoint.save import Checkpointer
from mlt.config.check import check_run
from mlt.config.dump import config_hash, to_yaml
from mlt.config.override import apply_sets
from mlt.config.run import RunConfig, TrainConfig
from mlt.data.config import DataConfig
from mlt.data.huggingface import HuggingFaceTokenizer
from mlt.errors import UserError
from mlt.export.huggingface.architecture import same_function
from mlt.export.huggingface.registry import read_config
from mlt.export.huggingface.weights import model_of, read_json, read_tensors
from mlt.model.lm import LMConfig
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules
from mlt.train.fit import check_fits
from mlt.train.run_directory import RunDirectory
from mlt.train.setup import build_optimizer, describe_model
from mlt.train.state import abstract_state, create_state

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def import_run(source: Path, run_dir: Path, *, sets: Sequence[str] = ()) -> str:
    """Make a run of a model directory of transformers: `mlt generate` draws from it, `mlt train` goes on from it.

    The weights become the checkpoint of step 0, with a fresh optimizer and the data at its start. The tokenizer's files are
    copied into the run directory; what config.json says nothing of (data, steps, optimizer, mesh) has defaults.

    Args:
        source: directory with config.json, safetensors and tokenizer.json.
        run_dir: new or empty directory.
        sets: `path=value` replacements in the run's config.

    Returns:
        What was read and how to go on, for the terminal.

    Raises:
        UserError: the architecture, a setting, a tensor or the directory is wrong; nothing has been written then.
    """
    values = read_json(source / "config.json")
    model_config = read_config(values, str(source / "config.json"))
    config = apply_sets(_run_config(source, values, model_config), sets)
    check_run(config)
    if changed := same_function(config.model, model_config, "not"):
        raise UserError(f"--set may not change what the weights compute: {'; '.join(changed)}")
    specs = describe_model(config)
    model = model_of(config.model, values, read_tensors(source), specs, str(source))
    directory = RunDirectory(run_dir)
    with directory.lock():
        if directory.config_path.exists():
            raise UserError(f"{run_dir} holds a run already; choose a new or empty directory")
        config = _with_own_tokenizer(config, source, directory.path)
        rules = Rules(Layout().build(jax.devices()[:1]))  # whatever mesh restores it puts it in place
        optimizer = build_optimizer(config, specs)
        if config.train.check_memory:
            check_fits(abstract_state(specs, optimizer, rules), specs, rules)
        state = create_state(specs, optimizer, rules, config.train.seed)
        placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), model, state.model)
        meta = {
            "config_hash": config_hash(config),
            "tokens": 0,
            "mesh": Layout().shape(),
            "versions": {"jax": jax.__version__},
            "imported": str(source),
        }
        with Checkpointer(directory.checkpoints_path, keep=config.checkpoint.keep) as checkpointer:
            checkpointer.save(0, dataclasses.replace(state, model=placed), data={}, meta=meta)
        directory.write_config(to_yaml(config))
    params = sum(leaf.size for leaf in jax.tree.leaves(model))
    return (
        f"{values['model_type']} with {params:,} values from {source} is step 0 of {run_dir}\nnext:\n"
        f'  mlt generate {run_dir} --prompt "Once"\n'
        f"  mlt train {run_dir} --run-dir {run_dir}    goes on from it with the data and steps of its config.yaml"
    )


def _run_config(source: Path, values: dict[str, Any], model: LMConfig) -> RunConfig:
    file = source / _TOKENIZER_FILES[0]
    if not file.is_file():
        raise UserError(
            f"{file} is missing; a run needs its tokenizer. Save it there (tokenizer.save_pretrained) and import again"
        )
    length = min(values.get("max_position_embeddings") or 2048, 2048)
    tokenizer = HuggingFaceTokenizer(path=str(file), vocab_multiple=1)
    data = DataConfig(tokenizer=tokenizer, sequence_length=length, batch_size=8)
    return RunConfig(model=model, data=data, train=TrainConfig(steps=1000))


def _with_own_tokenizer(config: RunConfig, source: Path, run_dir: Path) -> RunConfig:
    """The config with the tokenizer's files in the run directory, so that the run needs its source no more."""
    tokenizer, folder = config.data.tokenizer, run_dir / "tokenizer"
    if not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.path != str(source / _TOKENIZER_FILES[0]):
        return config
    try:
        folder.mkdir(exist_ok=True)
        for name in _TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
    except OSError as error:
        raise UserError(f"{folder}: the tokenizer cannot be copied there: {error.strerror}") from error
    tokenizer = tokenizer.replace(path=str((folder / _TOKENIZER_FILES[0]).absolute()))
    return config.replace(data=config.data.replace(tokenizer=tokenizer))
