r"""A whole sequence of tasks, forecast at once: one block Gauss-Seidel sweep in weight space.

Training task s from W_{s-1} is the map `W_s = W_{s-1} + Delta W_s(W_{s-1})`. For ridge anchored at each start this is
block row s of `(D + L) a = f(W_0) - y`, with L the lower block triangle of the joint kernel and
`D = blockdiag(K_ss + l I)`: one Gauss-Seidel sweep. The drift of task j after its own training is `phi_j (W_T - W_j)`.
No block K_st of samples x samples is ever formed. Source: derived for arXiv 2606.18024's linear head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_choice
from forgetcast.forecast.closed_form import closed_path, read
from forgetcast.forecast.path import check_classes
from forgetcast.forecast.route import weight_path
from forgetcast.forecast.training import Training, is_closed_form
from forgetcast.metrics.matrix import all_metrics
from forgetcast.tangent.features import Features, check_labels, check_targets
from forgetcast.tangent.linear_head import LinearHead, apply_head, check_width

LossOutputs = Literal["all", "seen", "task"]
Weight = Float[Tensor, "rows C"]
Advance = Callable[[Weight, Training], Weight]


@dataclass(frozen=True, eq=False)
class SequenceForecast:
    """What a whole sequence of tasks will do to each of them, before the first step of the first.

    Attributes:
        head: the head at the start.
        weights: (rows, C) after each task, T of them.
        evaluation: the samples that accuracy and drift are forecast for, one `Features` a task.
        outputs: the outputs that each task brings; scored are those of all tasks so far.
    """

    head: LinearHead
    weights: tuple[Weight, ...]
    evaluation: tuple[Features, ...]
    outputs: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.weights)

    def head_after(self, task: int) -> LinearHead:
        """The head that is forecast after training `task` (0 for the first)."""
        return self.head.replaced(self.weights[task])

    def drift(self, task: int, after: int = -1) -> Float[Tensor, "n C"]:
        """Drift of a task's outputs between the end of its own training and that of task `after` (the last)."""
        step = self.weights[after] - self.weights[task]
        return torch.cat([apply_head(step, phi) for phi, _ in self.evaluation[task].blocks()])

    @cached_property
    def accuracy_matrix(self) -> list[list[float]]:
        """Row t: forecast accuracies of tasks 0 .. t after training task t, over all outputs seen so far."""
        stages = len(self)
        columns = [self._accuracies(task) for task in range(stages)]
        return [[columns[task][stage - task] for task in range(stage + 1)] for stage in range(stages)]

    @property
    def metrics(self) -> dict[str, float]:
        """Every average accuracy and forgetting, by the name of its definition."""
        return all_metrics(self.accuracy_matrix)

    def _accuracies(self, task: int) -> list[float]:
        """Accuracy of one task after each stage from its own on, in one pass over its samples."""
        stages = range(task, len(self))
        wide = torch.cat([self.weights[stage] for stage in stages], 1)
        seen = [union(self.outputs[: stage + 1]) for stage in stages]
        hits, rows = [0] * len(stages), 0
        for phi, y in self.evaluation[task].blocks():
            labels = check_labels(self.evaluation[task].name, y, self.head.outputs).to(phi.device)
            for index, logits in enumerate(torch.split(apply_head(wide, phi), self.head.outputs, 1)):
                scored = torch.tensor(seen[index], device=phi.device)
                hits[index] += int((scored[logits[:, scored].argmax(1)] == labels).sum())
            rows += len(phi)
        return [hit / rows for hit in hits]


def forecast_sequence(
    tasks: Sequence[Features],
    head: LinearHead,
    training: Training,
    *,
    evaluation: Sequence[Features] | None = None,
    loss_outputs: LossOutputs = "all",
) -> SequenceForecast:
    """Forecast every earlier task's drift and accuracy over a whole sequence, exactly. One pass over each task.

    Args:
        tasks: training features and targets of each task, in order.
        head: the head at the start, with the outputs of all tasks.
        training: how each task will be trained.
        evaluation: samples to forecast for; the training samples by default.
        loss_outputs: the outputs that the loss of a task sees: all of the head, those of the tasks so far, or its own.

    Raises:
        ValueError: no task, features or targets that do not fit, an unstable learning rate.

    Cost: for each task that of `forecast_linear`, without an old pass until drift or accuracy are asked for.
    """
    tasks, evaluation = check_sequence(tasks, evaluation, head, training)
    require_choice("loss_outputs", loss_outputs, ("all", "seen", "task"))
    outputs = outputs_of(tasks, head)
    weights: list[Weight] = []
    current = head.stacked()
    for index, task in enumerate(tasks):
        step = narrowed(training, outputs[: index + 1], loss_outputs)
        path = weight_path(task, head_of(head, current), step, None)
        (change,) = path.changes([path.final])
        current = current.to(change) + change
        weights.append(current)
    return SequenceForecast(head, tuple(weights), tuple(evaluation), tuple(outputs))


def head_of(head: LinearHead, weight: Weight) -> LinearHead:
    """A head like `head` with these weights, kept in float64: rounding between tasks would be another training."""
    return LinearHead(weight[: head.width], None if head.bias is None else weight[-1])


def task_advance(task: Features, head: LinearHead, training: Training) -> Advance:
    """The map `(weights before, training) -> weights after` of one task, its features read once.

    Closed forms keep the task's spectrum and slope; simulations run again for each start.
    """
    reference = head.stacked()
    if is_closed_form(training):
        reading = read(task, head, training.classes)
        _ = reading.moments.spectrum  # taken once for all starts, instead of a solve for each
        reference = reference.to(reading.slope.device)

        def advance(weight: Weight, step: Training) -> Weight:
            assert is_closed_form(step)
            path = closed_path(step, reading.moved(weight - reference), weight)
            return weight + path.changes([float(getattr(step, step.dial))])[0]

        return advance

    def simulate(weight: Weight, step: Training) -> Weight:
        path = weight_path(task, head_of(head, weight), step, None)
        return weight + path.changes([path.final])[0]

    return simulate


def check_sequence(
    tasks: Sequence[Features], evaluation: Sequence[Features] | None, head: LinearHead, training: Training
) -> tuple[list[Features], list[Features]]:
    """Tasks and evaluation sets, if they fit each other, the head and the training."""
    if not tasks:
        raise complaint("a sequence of no tasks", "at least one task", "Give the tasks in training order.")
    evaluation = tasks if evaluation is None else evaluation
    if len(evaluation) != len(tasks):
        raise complaint(
            f"{len(evaluation)} evaluation sets for {len(tasks)} tasks", "one for each task", "Leave None to use tasks."
        )
    for features in (*tasks, *evaluation):
        if features.read_once:
            raise complaint(
                f"{features.name}: a generator, which is read once",
                "features that can be read again",
                "Give an array, a DataLoader or the function that makes the generator.",
            )
        if features.is_array:
            check_width(features.name, features.phi, head)
            check_targets(features.name, features.y, head.outputs)
    for task in tasks:
        check_classes(training, task, head.outputs)
    return list(tasks), list(evaluation)


def outputs_of(tasks: Sequence[Features], head: LinearHead) -> list[tuple[int, ...]]:
    """The outputs that each task brings: its labels; all outputs of the head for real-valued targets."""
    result: list[tuple[int, ...]] = []
    for task in tasks:
        labels: set[int] = set()
        for _, y in task.blocks():
            y = check_targets(task.name, y, head.outputs)
            labels |= set(range(head.outputs)) if y.ndim == 2 else set(torch.unique(y).tolist())
        result.append(tuple(sorted(labels)))
    return result


def narrowed(training: Training, outputs: Sequence[tuple[int, ...]], loss_outputs: LossOutputs) -> Training:
    """The training of the last of these tasks: its loss told which outputs it sees."""
    if loss_outputs == "all":
        return training
    if training.classes is not None:
        raise complaint(
            f"got loss_outputs={loss_outputs!r} beside training.classes={training.classes}",
            "one of the two",
            "Leave training.classes=None.",
        )
    return replace(training, classes=outputs[-1] if loss_outputs == "task" else union(outputs))


def union(outputs: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """All outputs of these tasks, rising."""
    return tuple(sorted({label for own in outputs for label in own}))
