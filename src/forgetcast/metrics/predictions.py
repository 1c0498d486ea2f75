"""What logits and labels say: accuracy with and without being told the task, by class, and calibration."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forgetcast.checks import complaint, require_integer


def class_incremental_accuracy(logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> float:
    """Share of samples whose largest logit among all outputs is their label's; the task is not told.

    Raises:
        ValueError: no samples, or labels that are no outputs.
    """
    _require_labels(logits, labels)
    return _share(logits.argmax(1) == labels)


def task_incremental_accuracy(
    logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], tasks: Sequence[Sequence[int]]
) -> float:
    """Share of samples whose largest logit among their own task's outputs is their label's; never below the other.

    Args:
        logits: of all outputs, the same that `class_incremental_accuracy` takes.
        labels: outputs.
        tasks: outputs of each task, disjoint.

    Raises:
        ValueError: no samples, labels that are no outputs or of no task, or an output that two tasks claim.
    """
    _require_labels(logits, labels)
    owner = torch.full((logits.shape[1],), -1, dtype=torch.int64, device=logits.device)
    claimed = [output for task in tasks for output in task]
    if len(set(claimed)) < len(claimed) or any(not 0 <= output < logits.shape[1] for output in claimed):
        raise complaint(
            f"tasks of outputs {[list(task) for task in tasks]}",
            f"disjoint outputs below {logits.shape[1]}",
            "Give each output to one task.",
        )
    for index, task in enumerate(tasks):
        owner[list(task)] = index
    if (owner[labels] < 0).any():
        raise complaint(
            f"labels {sorted(set(labels[owner[labels] < 0].tolist()))} of no task",
            f"outputs of the tasks {[list(task) for task in tasks]}",
            "Give the outputs of every task that the labels come from.",
        )
    foreign = owner[None, :] != owner[labels][:, None]
    return _share(logits.masked_fill(foreign, -torch.inf).argmax(1) == labels)


def per_class_accuracy(logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> dict[int, float]:
    """Class-incremental accuracy of the samples of each class that has any, by its output.

    Raises:
        ValueError: no samples, or labels that are no outputs.
    """
    _require_labels(logits, labels)
    right = logits.argmax(1) == labels
    return {label: _share(right[labels == label]) for label in sorted(set(labels.tolist()))}


def per_class_drop(before: Mapping[int, float], after: Mapping[int, float]) -> dict[int, float]:
    """Accuracy before minus after for each class of `before`; positive is forgotten.

    Raises:
        ValueError: `after` lacks a class.
    """
    lost = sorted(set(before) - set(after))
    if lost:
        raise complaint(f"classes {lost} measured before only", "the same classes after", "Evaluate them again.")
    return {label: value - after[label] for label, value in before.items()}


def expected_calibration_error(logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], bins: int = 15) -> float:
    """`calibration_error` of the largest softmax of each sample.

    Args:
        logits: of all outputs.
        labels: outputs.
        bins: number of bins of equal width.

    Raises:
        ValueError: no samples, labels that are no outputs, or no bins.
    """
    _require_labels(logits, labels)
    confidence, guess = logits.double().softmax(1).max(1)
    return calibration_error(confidence, guess == labels, bins)


def calibration_error(confidence: Float[Tensor, " n"], right: Bool[Tensor, " n"], bins: int = 15) -> float:
    """Gap between confidence and accuracy, averaged over samples.

        sum_m |B_m| / n  | acc(B_m) - conf(B_m) |,      B_m = { i : (m - 1) / bins < confidence_i <= m / bins }

    Args:
        confidence: of each prediction, in [0, 1].
        right: whether it was right.
        bins: number of bins of equal width.

    Raises:
        ValueError: no samples, a confidence outside [0, 1], or no bins.

    Source: arXiv 1706.04599, eq. 3, with 15 bins as there.
    """
    require_integer("bins", bins, least=1)
    if len(confidence) == 0 or not bool(((confidence >= 0) & (confidence <= 1)).all()):
        span = "outside [0, 1]" if len(confidence) else "of no samples"
        raise complaint(
            f"confidences of shape {tuple(confidence.shape)} {span}",
            "at least one, all in [0, 1]",
            "Give the largest softmax of each sample.",
        )
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, place, right.double() - confidence.double())
    return float(gap.abs().sum()) / len(confidence)


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _require_labels(logits: Tensor, labels: Tensor) -> None:
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        span = f"from {int(labels.min())} to {int(labels.max())}" if len(labels) else "of no samples"
        raise complaint(
            f"labels {span} for logits of shape {tuple(logits.shape)}",
            f"at least one label, all outputs below {logits.shape[1]}",
            "Give one row of logits and one label a sample.",
        )
