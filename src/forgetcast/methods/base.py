"""The contract between a method of continual learning, the protections it is composed of, and the loop that runs it.

For every task the loop calls

    begin_task(task)      grow the head, choose what trains, read what the task needs
    loss(batch)           what is minimised; then backward
    after_backward()      the gradients are there, the step is not
    after_step()          the step is there
    end_task(task)        remember what must not be lost

and between tasks `predict(inputs)`, which is never told the task. `state_dict` holds all that resume needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from forgetcast.checks import complaint
from forgetcast.forecast.network.head import Restraint
from forgetcast.forecast.training import SGD, AdamW

State = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples of a task.

    Attributes:
        inputs: (n, ...) what the backbone takes.
        labels: (n,) outputs of the head.
        indices: (n,) places in the source.
        rows: samples of the whole batch where processes share it, sample i being with process i mod their number;
            None where this is the whole.
    """

    inputs: Tensor
    labels: Int[Tensor, " n"]
    indices: Int[Tensor, " n"]
    rows: int | None = None


@dataclass(frozen=True, eq=False)
class TaskData:
    """What a method is told of a task while it trains on it.

    Attributes:
        index: 0 for the first.
        classes: outputs that it brings.
        seen: outputs of all tasks so far, this one included, rising.
        batches: reads the training samples once, in order, as they are evaluated (no augmentation).
        training: says how the loop will train on it, as a forecast takes it, for these samples in this order, but for
            which outputs the method's loss sees; None where nobody knows, and where no step is taken.
        augmented: whether steps may see a sample otherwise than `batches` reads it.
    """

    index: int
    classes: tuple[int, ...]
    seen: tuple[int, ...]
    batches: Callable[[], Iterator[Batch]]
    training: Callable[[], SGD | AdamW] | None = None
    augmented: bool = True


class Model(nn.Module):
    """A backbone and a head.

    Args:
        backbone: maps inputs to features (n, d).
        head: maps features (n, d) to logits (n, C); has `outputs` and `grow(outputs)`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def features(self, inputs: Tensor) -> Float[Tensor, "n d"]:
        """Features of a batch.

        Raises:
            ValueError: a backbone whose output is no (n, d).
        """
        phi = self.backbone(inputs)
        if not isinstance(phi, Tensor) or phi.ndim != 2 or len(phi) != len(inputs):
            shape = tuple(phi.shape) if isinstance(phi, Tensor) else type(phi).__name__
            raise complaint(
                f"the backbone made {shape} of inputs {tuple(inputs.shape)}",
                "features (n, d), one row a sample",
                "Pool its output, for example with the class token or the mean over tokens.",
            )
        return phi

    def forward(self, inputs: Tensor) -> Float[Tensor, "n C"]:
        """Logits of a batch."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


class Protection:
    """What keeps old knowledge: any of the hooks, on whatever trainable parameters the model has.

    A protection works on the model given to its hooks and holds no reference to it.
    """

    def begin_task(self, model: Model, task: TaskData) -> None:
        """The task is known, the head has its outputs, nothing has trained yet."""

    def loss(self, model: Model, batch: Batch, logits: Float[Tensor, "n C"]) -> Tensor | None:  # noqa: ARG002
        """A term added to the loss of this batch, if any. `logits` are the model's, with gradient."""
        return None

    def after_backward(self, model: Model) -> None:
        """Gradients are there, the step is not."""

    def after_step(self, model: Model) -> None:
        """The step is there."""

    def end_task(self, model: Model, task: TaskData) -> None:
        """Remember what must not be lost."""

    def restraint(self, model: Model) -> Restraint | None:  # noqa: ARG002
        """What this protection makes of each step, if that is all that it does to steps: a forecast can follow it.

        Returns:
            (parameters before a step, the step) -> what is taken of it, by the names of the model's parameters.
        """
        return None

    def decided(self) -> list[dict[str, Any]]:
        """What it decided before each task so far, in plain JSON values: `task`, `text` and whatever led to it."""
        return []

    @property
    def acts_on_steps(self) -> bool:
        """Whether it has a say in the steps; if not, it acts before the first and after the last of a task alone."""
        hooks = ("loss", "after_backward", "after_step")
        return any(getattr(type(self), hook) is not getattr(Protection, hook) for hook in hooks)

    def state_dict(self) -> State:
        """All that resume needs: a nested dict of tensors and plain JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""


class Method(ABC):
    """A method of continual learning on a model.

    Args:
        model: backbone and head.
        protections: what keeps old knowledge, in the order in which their hooks run.

    Attributes:
        by_gradient: whether there are gradient steps; a closed form learns in `begin_task` and `end_task` alone.
        joint: whether the loop gives each task the training samples of all tasks so far (upper bound).
    """

    by_gradient = True
    joint = False

    def __init__(self, model: Model, protections: Sequence[Protection] = ()) -> None:
        self.model = model
        self.protections = tuple(protections)
        self.classes: tuple[int, ...] = ()
        self.seen: tuple[int, ...] = ()

    def begin_task(self, task: TaskData) -> None:
        """Grow the head to the outputs seen, then tell the protections."""
        self.model.head.grow(max(task.seen) + 1)  # type: ignore[operator]
        self.classes = task.classes
        self.seen = task.seen
        for protection in self.protections:
            protection.begin_task(self.model, task)

    def takes_steps(self, index: int) -> bool:  # noqa: ARG002
        """Whether the loop takes gradient steps in task `index`."""
        return self.by_gradient

    def plain_outputs(self) -> tuple[int, ...] | None:
        """The outputs of the cross-entropy on the new samples that a step minimises, but for what protections add.

        None, the default, where the method is more than that: a step, what follows the last one or a prediction is not
        that of plain fine-tuning of backbone and head, so that a forecast of this would say nothing of the method.
        """
        return None

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """What is minimised on this batch. All processes call it alike, so it may exchange tensors among them."""

    def after_backward(self) -> None:
        """The gradients are there, the step is not."""
        for protection in self.protections:
            protection.after_backward(self.model)

    def after_step(self) -> None:
        """The step is there."""
        for protection in self.protections:
            protection.after_step(self.model)

    def end_task(self, task: TaskData) -> None:
        """Remember what must not be lost."""
        for protection in self.protections:
            protection.end_task(self.model, task)

    def predict(self, inputs: Tensor) -> Float[Tensor, "n C"]:
        """Logits over every output seen so far. Each row depends on its own input alone."""
        logits: Tensor = self.model(inputs)
        return logits

    def decided(self) -> list[dict[str, Any]]:
        """What the protections decided before each task so far; the loop reports it, the record keeps it."""
        return [decision for protection in self.protections for decision in protection.decided()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser trains, as `torch.optim` takes it."""
        return [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}]

    def state_dict(self) -> State:
        """All that resume needs, also within a task: a nested dict of tensors and plain JSON values."""
        return {
            "model": dict(self.model.state_dict()),
            "trainable": [name for name, parameter in self.model.named_parameters() if parameter.requires_grad],
            "classes": list(self.classes),
            "seen": list(self.seen),
            "protections": {str(i): protection.state_dict() for i, protection in enumerate(self.protections)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; the head grows to the outputs it holds."""
        if state["seen"]:
            self.model.head.grow(max(state["seen"]) + 1)  # type: ignore[operator]
        self.model.load_state_dict(state["model"])
        trainable = set(state["trainable"])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trainable)
        self.classes, self.seen = tuple(state["classes"]), tuple(state["seen"])
        for i, protection in enumerate(self.protections):
            protection.load_state_dict(state["protections"][str(i)])


def places_among(classes: Sequence[int], labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Place of each label among a task's classes in rising order, for a loss over these alone.

    Raises:
        ValueError: a label of another class.
    """
    rising = torch.tensor(sorted(classes), device=labels.device)
    if not bool(torch.isin(labels, rising).all()):
        raise complaint(
            f"samples of outputs {sorted(set(labels.tolist()) - set(classes))} in a task that brings {sorted(classes)}",
            "samples of the task's own classes, over which its loss runs",
            "Take a stream that is not blurry, or another method.",
        )
    return torch.searchsorted(rising, labels)


def protected_loss(
    method: Method, batch: Batch, logits: Float[Tensor, "n C"], outputs: Sequence[int], labels: Int[Tensor, " n"]
) -> Tensor:
    """Cross-entropy over `outputs` (the others masked out), plus what the method's protections add."""
    place = torch.full((logits.shape[1],), -1, dtype=torch.int64, device=logits.device)
    place[list(outputs)] = torch.arange(len(outputs), device=logits.device)
    total = cross_entropy(logits[:, list(outputs)], place[labels])
    for protection in method.protections:
        term = protection.loss(method.model, batch, logits)
        if term is not None:
            total = total + term
    return total
