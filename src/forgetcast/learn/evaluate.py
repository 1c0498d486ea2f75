"""Evaluation: logits of every task seen, once; both scenarios' accuracies from the same logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from forgetcast.methods.base import Method

Read = Callable[[Int[np.ndarray, " _"]], Tensor]


@dataclass(frozen=True)
class Scores:
    """Accuracy on one task's test samples.

    Attributes:
        class_incremental: among all outputs seen so far.
        task_incremental: among the task's own outputs, from the same logits.
    """

    class_incremental: float
    task_incremental: float


def logits_of(
    method: Method, read: Read, indices: Int[np.ndarray, " n"], batch_size: int, device: torch.device
) -> Float[Tensor, "n C"]:
    """Logits over the outputs seen so far, on the CPU, in evaluation mode and without gradient."""
    training = method.model.training
    method.model.eval()
    try:
        with torch.no_grad():
            parts = [
                method.predict(read(indices[start : start + batch_size]).to(device)).float().cpu()
                for start in range(0, len(indices), batch_size)
            ]
    finally:
        method.model.train(training)
    return torch.cat(parts)


def scores(logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], seen: Sequence[int], own: Sequence[int]) -> Scores:
    """Accuracies of one task from its logits, with the outputs `seen` so far and the task's `own`."""
    return Scores(_accuracy(logits, labels, seen), _accuracy(logits, labels, own))


def _accuracy(logits: Tensor, labels: Tensor, outputs: Sequence[int]) -> float:
    chosen = torch.tensor(sorted(outputs))
    return float((chosen[logits[:, chosen].argmax(1)] == labels).double().mean())
