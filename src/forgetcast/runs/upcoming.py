"""The task that a run is about to learn, as a forecast takes it: model, samples, training, and what it leaves out."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from forgetcast.checks import complaint
from forgetcast.forecast.network.head import Named, Restraint
from forgetcast.forecast.training import SGD, AdamW
from forgetcast.learn.samples import Samples
from forgetcast.methods.base import Method
from forgetcast.methods.viewed import viewed
from forgetcast.runs.assembly import Assembly


@dataclass(frozen=True, eq=False)
class Upcoming:
    """Task `index`, begun and not trained.

    Attributes:
        index: of the task.
        model: gives logits; shares the parameters of the method's model.
        trained: names of those of its parameters that the method trains.
        places: (n,) of the old samples in the source.
        tasks: (n,) which earlier task each is from.
        old: their inputs and outputs.
        new: inputs and outputs of what the task trains on, in the order that the training's batches refer to.
        training: what the loop will do.
        restraint: what its protections make of each step, where that is all that they do.
        answers_now: (n, C) among which outputs a prediction for each old sample chooses before the task.
        answers_then: the same after it.
        left_out: what the run does beyond this, in words.
    """

    index: int
    model: nn.Module
    trained: tuple[str, ...]
    places: Int[np.ndarray, " n"]
    tasks: Int[np.ndarray, " n"]
    old: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]
    training: SGD | AdamW
    restraint: Restraint | None
    answers_now: Bool[Tensor, "n C"]
    answers_then: Bool[Tensor, "n C"]
    left_out: tuple[str, ...]


def require_steps(method: Method, name: str, index: int) -> None:
    """Raise unless task `index` is one of gradient steps that a forecast can describe."""
    if not method.takes_steps(index):
        raise complaint(
            f"{name} takes no gradient step in task {index}",
            "a method that learns it by gradient",
            "Nothing has to be forecast of a closed form: `forgetcast run` solves each task in one reading.",
        )
    if method.plain_outputs() is None:
        raise complaint(
            f"{name}, which is more than fine-tuning of backbone and head",
            "a method whose steps are those of plain fine-tuning, but for what its protections add",
            "Add method.name=sequential, and leave out its options: that is what the method has to prevent.",
        )


def upcoming(made: Assembly, index: int, most_old: int) -> Upcoming:
    """Begin task `index` on a model that has learnt those before it, and say what will train.

    Args:
        made: the run, at the end of task `index` - 1; its method begins the task, so that the run itself cannot go on.
        index: at least 1.
        most_old: test samples of earlier tasks, at most; evenly from all classes.

    Raises:
        ValueError: as `require_steps`; parameters with rates of their own; whatever the method's beginning refuses.
    """
    method, stream, optimization = made.method, made.stream, made.optimization
    require_steps(method, made.recipe.method.name, index)
    samples = Samples(
        stream,
        made.prepared.read,
        joint=method.joint,
        batch_size=optimization.batch_size,
        accelerator=made.accelerator,
    )
    seen_now = method.seen
    indices, new_labels = samples.of_task(index)
    described = partial(optimization.described, len(indices), made.recipe.seed, index)
    method.begin_task(replace(samples.task_data(index), training=described))
    plain = method.plain_outputs()
    assert plain is not None
    places, tasks = _old_samples(made, index, most_old)
    labels = torch.from_numpy(stream.outputs[places])
    model = viewed(method.model)
    outputs = int(method.model.head.outputs)  # type: ignore[arg-type]
    own = [stream[task].classes if stream.task_incremental else None for task in tasks.tolist()]
    return Upcoming(
        index,
        model,
        _trained(model, method),
        places,
        tasks,
        (made.prepared.read(places), labels),
        (made.prepared.read(indices), new_labels),
        described(plain if len(plain) < outputs else None),
        _restraint(model, method),
        allowed([classes or seen_now for classes in own], outputs),
        allowed([classes or method.seen for classes in own], outputs),
        _left_out(made),
    )


def answers(logits: Float[Tensor, "n C"], allowed: Bool[Tensor, "_ C"]) -> Float[Tensor, "n C"]:
    """One where the largest of the allowed logits is, else zero: the answers, in the form of logits.

    Args:
        logits: (n, C).
        allowed: the outputs that each sample's prediction chooses from, (n, C); or (1, C), the same for all.
    """
    best = logits.masked_fill(~allowed.to(logits.device), -torch.inf).argmax(1)
    return torch.nn.functional.one_hot(best, logits.shape[1]).to(logits)


def _old_samples(made: Assembly, index: int, most: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Test samples of the tasks before `index` and their tasks; evenly spaced where samples lie class by class."""
    earlier = made.stream.tasks[:index]
    places = np.concatenate([task.test for task in earlier])
    tasks = np.repeat(np.arange(index), [len(task.test) for task in earlier])
    if len(places) > most:
        by_class = np.lexsort((made.stream.outputs[places], tasks))
        kept = np.sort(by_class[np.linspace(0, len(places) - 1, most).round().astype(np.int64)])
        places, tasks = places[kept], tasks[kept]
    return places, tasks


def _trained(model: nn.Module, method: Method) -> tuple[str, ...]:
    groups = method.parameter_groups()
    own = sorted({key for group in groups for key in group} - {"params"})
    if own:
        raise complaint(
            f"parameter groups with their own {own}",
            "the same rate and decay for all that trains",
            "Leave these options of the method out.",
        )
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in trained)


def _restraint(model: nn.Module, method: Method) -> Restraint | None:
    """Those of all protections, one after the other, for a model that shares the parameters under other names."""
    given = [protection.restraint(method.model) for protection in method.protections]
    found = [restraint for restraint in given if restraint is not None]
    if not found:
        return None
    of_method = {id(parameter): name for name, parameter in method.model.named_parameters()}
    names = {name: of_method[id(parameter)] for name, parameter in model.named_parameters()}

    def restrained(before: Named, step: Named) -> Named:
        start, taken = ({names[name]: value for name, value in some.items()} for some in (before, step))
        for restraint in found:
            taken = dict(restraint(start, taken))
        return {name: taken[names[name]] for name in step}

    return restrained


def allowed(choices: list[tuple[int, ...]], outputs: int) -> Bool[Tensor, "n C"]:
    """One row for each choice among the outputs, true where it may fall."""
    rows = torch.zeros(len(choices), outputs, dtype=torch.bool)
    for row, choice in zip(rows, choices, strict=True):
        row[list(choice)] = True
    return rows


def _left_out(made: Assembly) -> tuple[str, ...]:
    """What acts in the run's steps and not in the forecast's."""
    method, name = made.method, made.recipe.method.name
    found = [
        f"the protection {type(protection).__name__} of {name}: the forecast is of the training without it, which is "
        "what it has to prevent"
        for protection in method.protections
        if protection.acts_on_steps and protection.restraint(method.model) is None
    ]
    if made.prepared.read_training is not None:
        found.append("random crops and flips: the forecast takes the training images as they are evaluated")
    if made.recipe.training.precision != "float32":
        found.append(f"the loss in {made.recipe.training.precision}: the forecast is in float32")
    trains = any(parameter.requires_grad for parameter in method.model.backbone.parameters())
    random = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    if trains and any(isinstance(part, random) and getattr(part, "p", 1) > 0 for part in method.model.modules()):
        found.append("dropout and statistics of the batch: the forecast takes the model in evaluation mode")
    return tuple(found)
