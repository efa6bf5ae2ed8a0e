"""Distillation: a student learns from the model of another run, its teacher, which stays as it is.

Two ways, which are the two stages of Lizard (arXiv 2507.09025) and of other recipes that linearize a softmax model:

    outputs     each sequence mixer that is not the teacher's learns to give what the teacher's gives for the same input:
                the mean over those layers of the squared difference, the stream being the teacher's throughout
    logits      (1 - weight) cross-entropy + weight temperature^2 KL(teacher | student) of the next token; weight 0 is plain
                training, and the teacher then only tells where the student starts

`mlt/train/teacher.py` finds and restores the teacher.
"""

import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mlt.config.base import Config
from mlt.config.problems import Problem
from mlt.loss import Batch, beside_neighbours, context_of, hidden_losses
from mlt.mixers.base import Aux, Context, Mixer, MixerConfig, SequenceMixerConfig
from mlt.model.edges import PARTS
from mlt.model.lm import LM, LMConfig
from mlt.model.remat import Remat
from mlt.nn.param import Buffer, path_name
from mlt.parallel.divergence import divergence
from mlt.parallel.rules import Rules

_MATCH = "metric/match"


class Distill(Config):
    """What a run learns from another.

    A new run takes every parameter of `start` that it has under the same name and in the same shape, and draws the others.
    Parameters that are not `trained` keep their bits: they have no gradient, no decay and no optimizer state.
    With `layers`, those of layers are taken from the layers that it names, and the others by name.

    Attributes:
        teacher: run directory of the teacher, with the student's tokenizer and vocabulary.
        step: its checkpoint; None takes the newest of a run that is complete.
        match: `outputs` of layers or `logits`, see the module's text.
        weight: share of the teacher's term in the loss, with `logits`.
        temperature: divides both models' logits, with `logits`.
        start: run directory whose newest checkpoint the student starts from; None starts from the teacher's.
        layers: for each layer of this model, in depth order, the number of the layer that it starts from; -1 draws it. Inside
            a layer names decide. None takes layers by name as everything else.
        trained: patterns of parameter names, as in a shell; `mlt check CONFIG --params` lists the names.
    """

    teacher: str
    step: int | None = None
    match: Literal["outputs", "logits"] = "logits"
    weight: float = 1.0
    temperature: float = 1.0
    start: str | None = None
    layers: tuple[int, ...] | None = None
    trained: tuple[str, ...] = ("*",)

    def problems(self) -> Iterator[Problem]:
        if not 0 <= self.weight <= 1:
            yield Problem("weight", self.weight, "must lie in [0, 1]")
        if self.temperature <= 0:
            yield Problem("temperature", self.temperature, "must be positive")
        if not self.trained:
            yield Problem("trained", (), "trains nothing", 'use ("*",) to train every parameter')
        if self.match == "outputs" and (self.weight, self.temperature) != (1.0, 1.0):
            yield Problem("match", "outputs", "has no logits for weight and temperature", "leave both at 1, or match='logits'")

    @property
    def listens(self) -> bool:
        """Whether the loss has a term of the teacher's."""
        return self.weight > 0

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name is trained."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.trained)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher's model, as a step takes it.

    Attributes:
        model: its arrays, to which no gradient flows; None where the loss has no term of the teacher's.
        distill: what is learned of it.
    """

    model: LM | None
    distill: Distill = dataclasses.field(metadata={"static": True})


def frozen(specs: LM, distill: Distill) -> LM:
    """A described model in which the parameters that are not trained are buffers."""
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731

    def hold(path: Any, variable: Any) -> Any:
        name = path_name((*path, jax.tree_util.GetAttrKey("value")))
        held = isinstance(variable, nnx.Param) and not distill.trains(name)
        return Buffer(*jax.tree.leaves(variable)) if held else variable

    return jax.tree_util.tree_map_with_path(hold, specs, is_leaf=is_variable)


def matched_layers(student: LMConfig, teacher: LMConfig) -> tuple[list[tuple[str, int, int]], list[Problem]]:
    """(part, block, sub-layer) of the mixers whose outputs are compared, and why they cannot be, with paths in the model."""
    layers, problems = [], []
    if student.stack.hyper_connections != teacher.stack.hyper_connections:
        rule = f"is not the teacher's, {teacher.stack.hyper_connections!r}, whose streams both run on"
        own = student.stack.hyper_connections
        problems.append(Problem("stack.hyper_connections", own, rule, "make them equal, or match logits"))
    for part in PARTS:
        ours, theirs = getattr(student.stack, part), getattr(teacher.stack, part)
        path, sizes = f"stack.{part}", [(len(s), t) for s, t in ((ours, student), (theirs, teacher))]
        counts = [(size, model.stack.times(part) if size else 1) for size, model in sizes]
        if counts[0] != counts[1]:
            rule = f"has {_times(*counts[0])}, the teacher's {_times(*counts[1])}"
            problems.append(Problem(path, len(ours), rule, "give both the same layers, or match logits"))
            continue
        for i, (own, other) in enumerate(zip(ours, theirs, strict=True)):
            fields = [name for name in type(own).model_fields if name != "mixers" and getattr(own, name) != getattr(other, name)]
            if fields or len(own.mixers) != len(other.mixers):
                what = f"{fields[0]} = {getattr(other, fields[0])}" if fields else f"{len(other.mixers)} mixers"
                problems.append(Problem(f"{path}[{i}]", f"{len(own.mixers)} mixers", f"the teacher's block has {what}"))
                continue
            for j, (mixer, goal) in enumerate(zip(own.mixers, other.mixers, strict=True)):
                if mixer == goal:
                    continue
                layers.append((part, i, j))
                if not (_alone(mixer, student.d_model) and _alone(goal, student.d_model)):
                    rule = f"differs from the teacher's {type(goal).__name__}, and only sequence mixers alone are matched"
                    ways_out = "take the teacher's mixer here, publish and share nothing, or match logits"
                    problems.append(Problem(f"{path}[{i}].mixers[{j}]", type(mixer).__name__, rule, ways_out))
    if not layers and not problems:
        ways_out = "give it other sequence mixers, or match logits"
        problems.append(Problem("stack", type(student.stack).__name__, "is the teacher's: no layer is left to match", ways_out))
    return layers, problems


def _times(count: int, repeats: int) -> str:
    return f"{count} x {repeats} blocks"


def _alone(mixer: MixerConfig, d_model: int) -> bool:
    """Whether it is a sequence mixer behind its block's norm that has nothing to do with other layers."""
    tied = mixer.publishes(d_model) or mixer.reads(d_model) or mixer.shares()
    return isinstance(mixer, SequenceMixerConfig) and mixer.pre_norm and not tied


class Matched(Mixer):
    """The teacher's mixer, with the student's beside it: its aux says how far that is off, (B, T)."""

    def __init__(self, student: Mixer, teacher: Mixer):
        self.student, self.teacher = student, teacher

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        goal_BTD = jax.lax.stop_gradient(self.teacher(x_BTD, ctx)[0])
        error_BTD = (self.student(x_BTD, ctx)[0] - goal_BTD).astype(jnp.float32)
        return goal_BTD, {_MATCH: jnp.mean(jnp.square(error_BTD), axis=-1)}


def distilled_losses(
    teacher: Teacher,
    student: LM,
    batch: Batch,
    rules: Rules,
    *,
    dtype: Any,
    remat: Remat,
    z_loss: float,
    train: bool,
    neighbour_weight: float = 0.0,
) -> tuple[jax.Array, Any]:
    """(weighted loss per token (B, T) float32, aux): what `mlt.loss.token_losses` is without a teacher.

    With `outputs` the aux has nothing for the student's buffers, which then stay as they are.
    """
    options = {"dtype": dtype, "remat": remat, "train": train}
    if teacher.distill.match == "outputs":
        return _output_losses(teacher, student, batch, rules, **options)
    return _logit_losses(teacher, student, batch, rules, z_loss=z_loss, neighbour_weight=neighbour_weight, **options)


def _output_losses(teacher, student, batch, rules, *, dtype, remat, train):
    both: Any = jax.tree.map(lambda leaf: leaf, teacher.model)
    layers, _ = matched_layers(student.config, both.config)
    for part, i, j in layers:
        sub_layer = getattr(both.stack, part)[i].sub_layers[j]
        sub_layer.mixer = Matched(getattr(student.stack, part)[i].sub_layers[j].mixer, sub_layer.mixer)
    _, aux = both(context_of(batch, rules, train=train), dtype=dtype, remat=remat)
    errors = [aux[part][i][j][_MATCH].reshape(-1, *batch["weights"].shape) for part, i, j in layers]
    error_BT = jnp.mean(jnp.concatenate(errors), axis=0)
    return error_BT * batch["weights"], {part: [] for part in PARTS}


def _logit_losses(teacher, student, batch, rules, *, dtype, remat, z_loss, neighbour_weight, train):
    distill, weights_BT, ctx = teacher.distill, batch["weights"], context_of(batch, rules, train=train)
    hidden_BTD, aux = student(ctx, dtype=dtype, remat=remat)
    losses_BT = hidden_losses(student, hidden_BTD, batch, rules, z_loss=z_loss)
    if teacher.model is None:
        return beside_neighbours(neighbour_weight, losses_BT, aux, student, hidden_BTD, batch, rules)
    goal_BTD = jax.lax.stop_gradient(teacher.model(ctx, dtype=dtype, remat=remat)[0])
    heads = [
        (hidden, model.unembedding().astype(dtype), model.config.logit_softcap)
        for hidden, model in ((goal_BTD, teacher.model), (hidden_BTD, student))
    ]
    apart_BT = weights_BT * divergence(rules, *heads, temperature=distill.temperature)
    total = jnp.maximum(jnp.sum(weights_BT), 1.0)
    facts = {"metric/kl": jnp.sum(apart_BT) / total, "metric/cross_entropy": jnp.sum(losses_BT) / total}
    mixed_BT = (1 - distill.weight) * losses_BT + distill.weight * distill.temperature**2 * apart_BT
    return mixed_BT, {**aux, "distill": facts}


def moved(model: LM, aux: Any, teacher: Teacher | None) -> LM:
    """The model with its buffers moved on after an update; none of a parameter that is not trained, none with `outputs`."""
    if teacher is None:
        return model.updated(aux)
    if teacher.distill.match == "outputs":
        return model
    trains = teacher.distill.trains
    choose = lambda path, old, new: new if trains(path_name(path)) else old  # noqa: E731
    return jax.tree_util.tree_map_with_path(choose, model, model.updated(aux))


def within_step(model: LM, aux: Any, teacher: Teacher | None) -> LM:
    """The model for the next micro-batch of a step; as it is with `outputs`, where aux has nothing of its layers."""
    return model if teacher is not None and teacher.distill.match == "outputs" else model.within_step(aux)


class Taught:
    """A jitted step, lowered or compiled or not, which is given its teacher at every call: an argument, not a constant of it."""

    def __init__(self, step: Any, teacher: Teacher):
        self._step, self._teacher = step, teacher

    def __call__(self, state: Any, batch: Batch) -> Any:
        return self._step(state, batch, self._teacher)

    def lower(self, state: Any, batch: Batch) -> "Taught":
        return Taught(self._step.lower(state, batch, self._teacher), self._teacher)

    def compile(self) -> "Taught":
        return Taught(self._step.compile(), self._teacher)

    def memory_analysis(self) -> Any:
        return self._step.memory_analysis()
