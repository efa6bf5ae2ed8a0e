"""A student that learns from another run: its loss to the teacher falls, and nothing moves but what is to be trained."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlt.checkpoint.save import Checkpointer
from mlt.config.check import check_run
from mlt.config.dump import to_yaml
from mlt.config.problems import ConfigError
from mlt.config.run import RunConfig, TrainConfig
from mlt.data.loader import DataConfig
from mlt.data.synthetic import SyntheticText
from mlt.data.tokenize import ByteTokenizer
from mlt.loss import token_losses
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.lizard import Lizard
from mlt.model.block import Block
from mlt.model.edges import PARTS
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.nn.param import Buffer, initialize, named_leaves, partition
from mlt.optim.adamw import AdamW
from mlt.optim.schedule import WarmupCosine
from mlt.parallel.divergence import divergence
from mlt.parallel.mesh import Layout
from mlt.parallel.rules import Rules
from mlt.run_paths import RunPaths
from mlt.train.distill import Distill, Teacher, distilled_losses, moved
from mlt.train.setup import Setup, build_optimizer, describe_model, step_options
from mlt.train.state import abstract_state, create_state
from mlt.train.step import jit_train_step
from mlt.train.teacher import load_teacher
from mlt.verify.material import lively, packed_rows

MAPS = ("*.mixer.query_map.kernel", "*.mixer.key_map.kernel", "*.mixer.decay.kernel", "*.mixer.sinks", "*.mixer.alpha")
HEADS = {"num_heads": 2, "head_dim": 8}


def lm(mixer, **changes) -> LMConfig:
    stack = Stack(period=(Block(mixers=(mixer, SwiGLU(d_ff=16))),), repeats=2)
    return LMConfig(**{"d_model": 16, "vocab_size": 272, "stack": stack, **changes})


SOFTMAX, LINEAR = lm(Attention(**HEADS)), lm(Lizard(**HEADS, window=4))


def run(model: LMConfig, steps: int, distill: Distill | None = None) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(source=SyntheticText(num_documents=20), sequence_length=32, batch_size=4),
        train=TrainConfig(steps=steps, compute_dtype="float32", grad_accumulation=2, distill=distill),
        optimizer=AdamW(learning_rate=2e-2),
        schedule=WarmupCosine(warmup_steps=2),
        remat=Remat(mode="none"),
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A run directory with a checkpoint of its last step."""
    directory, config = tmp_path_factory.mktemp("runs") / "teacher", run(SOFTMAX, 2)
    paths, specs = RunPaths(directory), describe_model(config)
    state = create_state(specs, build_optimizer(config, specs), Layout().rules(jax.devices()[:1]), seed=3)
    paths.path.mkdir()
    paths.config_path.write_text(to_yaml(config))
    with Checkpointer(paths.checkpoints_path) as checkpointer:
        checkpointer.save(2, state, data={}, meta={"tokens": 1})
    return str(directory)


def test_layers_come_to_give_what_the_teachers_give_and_nothing_else_moves(teacher):
    config, rules = run(LINEAR, 12, Distill(teacher=teacher, match="outputs", trained=MAPS)), Layout().rules(jax.devices()[:1])
    check_run(config)
    specs = describe_model(config)
    options = dataclasses.replace(step_options(config, rules, specs), teacher=load_teacher(config, rules))
    optimizer = build_optimizer(config, specs)
    setup = Setup(config, rules, None, specs, optimizer, options)
    state, taught = setup.fresh_state(), dict(named_leaves(options.teacher.model))
    first = {name: np.asarray(leaf) for name, leaf in named_leaves(state.model)}
    for name, leaf in first.items():
        assert name not in taught or np.array_equal(leaf, taught[name]), f"{name} does not start as the teacher's"
    kept = [name for name, _ in named_leaves(state.optimizer)]
    assert any("query_map" in name for name in kept)
    assert not any("embed" in name or ".query.kernel" in name for name in kept)

    batch = packed_rows(np.random.default_rng(0), rows=4, length=24, num_ids=64)
    step = jit_train_step(abstract_state(specs, optimizer, rules), optimizer, options).lower(state, batch).compile()
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.7 * losses[0], losses
    for name, leaf in named_leaves(state.model):
        assert np.array_equal(leaf, first[name]) != config.train.distill.trains(name), name


@pytest.mark.skipif(not os.environ.get("MLT_FULL"), reason="compiles a step for eight devices; MLT_FULL=1 runs it")
@pytest.mark.parametrize("match", ["outputs", "logits"])
def test_eight_devices_distil_as_one_does(teacher, match):
    distill = Distill(teacher=teacher, match=match, trained=MAPS, weight=0.5 if match == "logits" else 1.0)
    config, found = run(LINEAR, 3, distill), []
    batch = packed_rows(np.random.default_rng(0), rows=4, length=24, num_ids=64)
    for layout in (Layout(), Layout(fsdp=2, context=2, tensor=2)):
        rules, specs = layout.rules(jax.devices()[: layout.num_devices]), describe_model(config)
        options = dataclasses.replace(step_options(config, rules, specs), teacher=load_teacher(config, rules))
        optimizer = build_optimizer(config, specs)
        state = Setup(config, rules, None, specs, optimizer, options).fresh_state()
        placed = jax.device_put(batch, rules.sharding(("batch", "seq")))
        with jax.default_matmul_precision("highest"):
            new, metrics = jit_train_step(abstract_state(specs, optimizer, rules), optimizer, options)(state, placed)
        found.append(({name: float(value) for name, value in metrics.items()}, dict(named_leaves(new.optimizer))))
    (one, slots), (eight, other_slots) = found
    for name in ("train/loss", "train/grad_norm"):
        assert eight[name] == pytest.approx(one[name], rel=1e-5)
    # The first moment is a tenth of the clipped gradient.
    for name, slot in slots.items():
        if slot.size > 1:
            np.testing.assert_allclose(other_slots[name], slot, rtol=0, atol=1e-5 * np.abs(slot).max() + 1e-9, err_msg=name)


@pytest.fixture(scope="module")
def models():
    return {config: lively(initialize(config.build(), seed), seed, std=0.1) for seed, config in enumerate((SOFTMAX, LINEAR))}


def test_logits_are_matched_beside_the_data(models):
    batch = packed_rows(np.random.default_rng(0), rows=2, length=24, num_ids=64)
    options = {"dtype": jnp.dtype("float32"), "remat": Remat(mode="none"), "train": True}
    distill = Distill(teacher="t", match="logits", weight=0.75, temperature=2.0)

    @jax.jit
    def losses(teacher, student):
        own, _ = token_losses(student, batch, Rules(None), **options)
        mixed, aux = distilled_losses(Teacher(teacher, distill), student, batch, Rules(None), z_loss=0.0, **options)
        return own, mixed, aux["distill"]["metric/kl"]

    own, mixed, kl = losses(models[SOFTMAX], models[SOFTMAX])
    np.testing.assert_allclose(mixed, 0.25 * own, rtol=0, atol=1e-5)
    assert abs(float(kl)) < 1e-6
    own, mixed, kl = losses(models[SOFTMAX], models[LINEAR])
    assert float(kl) > 0.01
    np.testing.assert_allclose(np.sum(mixed), 0.25 * np.sum(own) + 0.75 * 4 * float(kl) * batch["weights"].sum(), rtol=1e-5)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_divergence_and_its_gradient_on_one_device_and_on_eight():
    rng = np.random.default_rng(1)
    hidden, goal = rng.standard_normal((4, 6, 8)).astype(np.float32), rng.standard_normal((4, 6, 4)).astype(np.float32)
    head, goal_head = rng.standard_normal((8, 10)).astype(np.float32), rng.standard_normal((4, 10)).astype(np.float32)
    cotangent = rng.standard_normal((4, 6)).astype(np.float32)

    def found(rules):
        def total(hidden, head):
            apart = divergence(rules, (goal, goal_head, 3.0), (hidden, head, None), temperature=2.0)
            return jnp.sum(apart * cotangent), apart

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, head)

    log_p = log_softmax(3 * np.tanh(goal.astype(np.float64) @ goal_head / 3) / 2)
    log_q = log_softmax(hidden.astype(np.float64) @ head / 2)
    slope_BTV = cotangent[..., None] * (np.exp(log_q) - np.exp(log_p)) / 2
    slopes = slope_BTV @ head.T, np.einsum("btd,btv->dv", hidden, slope_BTV)
    for rules in (Rules(None), Layout(fsdp=2, context=2, tensor=2).rules()):
        grads, apart = found(rules)
        np.testing.assert_allclose(apart, np.sum(np.exp(log_p) * (log_p - log_q), -1), rtol=0, atol=1e-5)
        for grad, slope in zip(grads, slopes, strict=True):
            np.testing.assert_allclose(grad, slope, rtol=0, atol=2e-5)


def test_what_is_not_trained_is_a_buffer_and_stays(models):
    distill = Distill(teacher="t", match="logits", trained=MAPS)
    specs = describe_model(run(LINEAR, 1, distill))
    trained, held = partition(specs)
    assert {name.rsplit(".mixer.", 1)[1] for name, _ in named_leaves(trained)} == {m.removeprefix("*.mixer.") for m in MAPS}
    assert isinstance(specs.embed.table, Buffer)
    assert "embed.table" in dict(named_leaves(held))
    model = models[LINEAR]
    aux = {part: [[{} for _ in block.sub_layers] for block in getattr(model.stack, part)] for part in PARTS}
    same = moved(model, aux, Teacher(models[SOFTMAX], distill))
    assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(model), strict=True))


REFUSED = {
    "no run": ({"teacher": "no/such/run"}, {}, "train.distill.teacher", "cannot be read"),
    "another tokenizer": ({}, {"tokenizer": ByteTokenizer(vocab_multiple=32)}, "train.distill.teacher", "another tokenizer"),
    "another vocabulary": (
        {},
        {"model": lm(Lizard(**HEADS), vocab_size=288)},
        "train.distill.teacher",
        "set model.vocab_size=272",
    ),
    "no such step": ({"step": 7}, {}, "train.distill.step", "those of steps 2"),
    "no such parameter": ({"trained": ("*.lora",)}, {}, "train.distill.trained[0]", "matches no parameter"),
    "an idle parameter": ({"trained": ("*",)}, {}, "train.distill.trained", "trains embed.table and"),
    "nothing to match": ({}, {"model": SOFTMAX}, "model.stack", "no layer is left to match"),
    "another depth": (
        {},
        {"model": LINEAR.replace(stack=LINEAR.stack.replace(repeats=3))},
        "model.stack.period",
        "the teacher's 1 x 2 blocks",
    ),
    "another feed-forward": (
        {},
        {
            "model": lm(Lizard(**HEADS)).replace(
                stack=Stack(period=(Block(mixers=(Lizard(**HEADS), SwiGLU(d_ff=24))),), repeats=2)
            )
        },
        "model.stack.period[0].mixers[1]",
        "only sequence mixers",
    ),
    "half a temperature": ({"temperature": 2.0}, {}, "train.distill.match", "no logits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, teacher):
    fields, changes, path, text = REFUSED[case]
    distill = Distill(**{"teacher": teacher, "match": "outputs", "trained": MAPS, **fields})
    config = run(changes.get("model", LINEAR), 2, distill)
    if "tokenizer" in changes:
        config = config.replace(data=config.data.replace(tokenizer=changes["tokenizer"]))
    with pytest.raises(ConfigError) as caught:
        check_run(config)
    found = [str(problem) for problem in caught.value.problems if problem.path == path]
    assert any(text in line for line in found), str(caught.value)
