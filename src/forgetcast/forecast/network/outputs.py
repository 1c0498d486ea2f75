"""Some of a model's outputs, numbered among themselves."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.path import check_seen
from forgetcast.forecast.training import Training
from forgetcast.tangent.jacobian import logits_of


def columns(outputs: Sequence[int]) -> Callable[[Any], Tensor]:
    """From what a model returns to the logits of these outputs, in rising order.

    Raises:
        ValueError: none, one twice, or one that the model does not have.
    """
    chosen = sorted({int(output) for output in outputs})
    if not chosen or len(chosen) != len(outputs):
        raise complaint(f"got outputs={list(outputs)}", "distinct outputs, at least one", "Leave None for all.")

    def read(found: Any) -> Tensor:
        logits: Tensor = logits_of(found)
        if not 0 <= chosen[0] <= chosen[-1] < logits.shape[-1]:
            raise complaint(
                f"got outputs={list(outputs)} for a model of {logits.shape[-1]} outputs",
                f"outputs in 0 .. {logits.shape[-1] - 1}",
                "Grow the model's head first.",
            )
        return logits[:, chosen]

    return read


def renumbered(samples: Samples, outputs: Sequence[int]) -> Samples:
    """Labels as places among the chosen outputs."""
    if samples.targets is None or samples.targets.ndim != 1:
        return samples
    chosen = torch.tensor(sorted(int(output) for output in outputs))
    check_seen(samples.name, samples.targets, tuple(chosen.tolist()))
    return replace(samples, targets=torch.searchsorted(chosen, samples.targets.cpu()))


def seeing(training: Training, outputs: Sequence[int]) -> Training:
    """The training with its classes as places among the chosen outputs."""
    if training.classes is None:
        return training
    chosen = sorted(int(output) for output in outputs)
    strangers = sorted(set(training.classes) - set(chosen))
    if strangers:
        raise complaint(
            f"got training.classes={training.classes} with outputs={list(outputs)}",
            "classes among the outputs",
            f"Add {strangers} to outputs, or leave them out of classes.",
        )
    return replace(training, classes=tuple(chosen.index(label) for label in training.classes))
