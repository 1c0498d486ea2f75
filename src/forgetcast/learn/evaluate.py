"""Evaluation: logits of the test samples of a task, once; every number of both scenarios from the same logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from forgetcast.checks import require_finite
from forgetcast.heads.base import UNSEEN
from forgetcast.methods.base import Method, TaskData
from forgetcast.metrics.predictions import calibration_error
from forgetcast.modes import evaluating
from forgetcast.streams.stream import Stream

Read = Callable[[Int[np.ndarray, " _"]], Tensor]


@dataclass(frozen=True, eq=False)
class Scores:
    """What the predictions for one task's test samples are worth.

    Attributes:
        class_incremental: accuracy among all outputs seen so far.
        task_incremental: accuracy among the task's own outputs, from the same logits.
        labels: (n,) outputs.
        right: (n,) whether each prediction was right, as the stream's scenario lets it choose.
        confidence: (n,) largest softmax of each, over the same outputs.
    """

    class_incremental: float
    task_incremental: float
    labels: Int[Tensor, " n"]
    right: Bool[Tensor, " n"]
    confidence: Float[Tensor, " n"]

    @property
    def accuracy(self) -> float:
        """As the stream's scenario lets a prediction choose."""
        return _share(self.right)


def logits_of(
    method: Method, read: Read, indices: Int[np.ndarray, " n"], batch_size: int, device: torch.device
) -> Float[Tensor, "n C"]:
    """Logits over the outputs seen so far, on the CPU, in evaluation mode and without gradient."""
    with torch.no_grad(), evaluating(method.model):
        parts = [
            method.predict(read(indices[start : start + batch_size]).to(device)).float().cpu()
            for start in range(0, len(indices), batch_size)
        ]
    return torch.cat(parts)


def scores(
    logits: Float[Tensor, "n C"],
    labels: Int[Tensor, " n"],
    seen: Sequence[int],
    own: Sequence[int],
    *,
    task_incremental: bool = False,
) -> Scores:
    """Scores of one task from its logits.

    Args:
        logits: an output that they lack is never chosen: within a task, a method may not know the new ones yet.
        labels: outputs.
        seen: outputs that a prediction chooses from.
        own: outputs of the task.
        task_incremental: whether `right` and `confidence` are among `own` instead.

    Raises:
        ValueError: logits that are not finite.
    """
    require_finite("logits", logits)
    logits = pad(logits, (0, max(0, 1 + max(*seen, *own) - logits.shape[1])), value=UNSEEN)
    free, told = _predictions(logits, labels, seen), _predictions(logits, labels, own)
    right, confidence = told if task_incremental else free
    return Scores(_share(free[0]), _share(told[0]), labels, right, confidence)


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Scores of the tasks of a stream.

    Args:
        method: predicts.
        stream: the tasks; its scenario says what a prediction may choose from.
        read: maps places in the source to inputs.
        batch_size: samples a prediction is asked of at once.
        device: where the inputs go.
    """

    method: Method
    stream: Stream
    read: Read
    batch_size: int
    device: torch.device

    def so_far(self, task: TaskData) -> list[Scores]:
        """Of every task up to this one."""
        return [self._scores(index, task.seen) for index in range(task.index + 1)]

    def next_task(self, task: TaskData) -> float | None:
        """Accuracy on the task after this one; None where that has an output that was not seen, or is not there."""
        following = task.index + 1
        if following == len(self.stream) or not set(self.stream[following].classes) <= set(task.seen):
            return None
        return self._scores(following, task.seen).accuracy

    def untrained(self, first: TaskData) -> list[float]:
        """Accuracy on every task before the first one is learnt; nothing where it lacks an output of another.

        The head grows to the outputs of the first task, as it would in the next moment.
        """
        tasks = self.stream.tasks
        if len(tasks) < 2 or not all(set(task.classes) <= set(first.seen) for task in tasks):
            return []
        self.method.model.head.grow(max(first.seen) + 1)  # type: ignore[operator]
        return [self._scores(index, first.seen).accuracy for index in range(len(tasks))]

    def _scores(self, index: int, seen: Sequence[int]) -> Scores:
        task = self.stream[index]
        logits = logits_of(self.method, self.read, task.test, self.batch_size, self.device)
        labels = torch.from_numpy(self.stream.outputs[task.test])
        return scores(logits, labels, seen, task.classes, task_incremental=self.stream.task_incremental)


def per_class(rows: Sequence[Scores], outputs: int) -> list[float | None]:
    """Share right of each output over all tasks' test samples; None for an output without one."""
    labels, right = torch.cat([row.labels for row in rows]), torch.cat([row.right for row in rows])
    counts = torch.bincount(labels, minlength=outputs)
    hits = torch.bincount(labels, weights=right.double(), minlength=outputs)
    return [hit / count if count else None for hit, count in zip(hits.tolist(), counts.tolist(), strict=True)]


def calibration(rows: Sequence[Scores]) -> float:
    """Expected calibration error over all tasks' test samples."""
    return calibration_error(torch.cat([row.confidence for row in rows]), torch.cat([row.right for row in rows]))


def _predictions(logits: Tensor, labels: Tensor, outputs: Sequence[int]) -> tuple[Tensor, Tensor]:
    chosen = torch.tensor(sorted(outputs))
    among = logits[:, chosen]
    place = among.argmax(1)  # of the logits: a softmax can round two of them to one value
    confidence = among.double().softmax(1).gather(1, place[:, None])[:, 0]
    return chosen[place] == labels, confidence


def _share(right: Tensor) -> float:
    return float(right.double().mean())
