"""What a forecast is asked about, checked: a network, old and new samples, and a training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from forgetcast.checks import complaint
from forgetcast.forecast.network.head import Network, Read, Restraint, network, probed
from forgetcast.forecast.network.outputs import columns, renumbered, seeing
from forgetcast.forecast.network.samples import Samples, samples_of
from forgetcast.forecast.path import check_seen, describe
from forgetcast.forecast.training import Training
from forgetcast.tangent.features import check_targets
from forgetcast.tangent.inputs import tensors
from forgetcast.tangent.jacobian import Choice, logits_of, trainable

Outputs = Callable[[Any], Tensor] | Sequence[int] | None


@dataclass(frozen=True, eq=False)
class Given:
    """A model, what trains of it, and on what.

    Attributes:
        net: the model and what trains.
        old: old samples; labels as places among the chosen outputs.
        new: new samples, likewise.
        training: likewise.
        described: the training as it was given, in plain values.
    """

    net: Network
    old: Samples
    new: Samples
    training: Training
    described: dict[str, Any]


def given(
    model: nn.Module,
    old: Any,
    new: Any,
    training: Training,
    parameters: Choice,
    outputs: Outputs,
    restraint: Restraint | None,
) -> Given:
    """Check what `forecast` is given.

    Raises:
        ValueError: what does not fit.
    """
    read = reader(outputs)
    chosen = trainable(model, parameters)
    old_samples, new_samples = samples_of("old", old), samples_of("new", new)
    device = next(model.parameters()).device
    net = network(model, _few(new_samples).to(device), chosen, read)
    net = replace(net, restraint=restraint)
    if _shapes(old_samples) != _shapes(new_samples):
        probed(model, _few(old_samples).to(device), read)
    described = describe(training)
    if outputs is not None and not callable(outputs):
        old_samples, new_samples = (renumbered(samples, outputs) for samples in (old_samples, new_samples))
        training = seeing(training, outputs)
    return Given(net, *_checked(net, old_samples, new_samples, training), training, described)


def reader(outputs: Outputs) -> Read:
    """From what the model returns to logits."""
    if outputs is None:
        return logits_of
    return outputs if callable(outputs) else columns(outputs)


def _few(samples: Samples) -> Samples:
    return samples.at(torch.arange(min(2, len(samples))))


def _shapes(samples: Samples) -> list[tuple[int, ...]]:
    return [tuple(part.shape[1:]) for part in tensors(samples.inputs)]


def _checked(net: Network, old: Samples, new: Samples, training: Training) -> tuple[Samples, Samples]:
    if new.targets is None:
        raise complaint("new: no targets", "labels or values to train on", "Give new=(inputs, targets).")
    if training.classes is not None and max(training.classes) >= net.outputs:
        raise complaint(
            f"got training.classes={training.classes} for a model of {net.outputs} outputs",
            f"outputs in 0 .. {net.outputs - 1}",
            "Grow the model's head first.",
        )
    checked = []
    for samples in (old, new):
        targets = samples.targets
        checked.append(
            samples if targets is None else replace(samples, targets=check_targets(samples.name, targets, net.outputs))
        )
    check_seen("new", checked[1].targets, training.classes)  # type: ignore[arg-type]
    return checked[0], checked[1]
