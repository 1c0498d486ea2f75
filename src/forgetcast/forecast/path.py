"""Where a training takes a linear head: the contract of closed forms and simulations."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.forecast.penalty import QuadraticPenalty
from forgetcast.forecast.training import AdamW, Ridge, Training
from forgetcast.tangent.features import Features
from forgetcast.tangent.spectrum import Spectrum

Change = Float[Tensor, "rows C"]


@dataclass(frozen=True, eq=False)
class WeightPath(ABC):
    """Where a training takes a linear head: Delta W for any value of the training's dial.

    Attributes:
        final: the value of the dial at the end of the training.
        within_new: whether every change lies in the span of the new features (no decay, penalty or Adam).
    """

    final: float
    within_new: bool

    @property
    @abstractmethod
    def form(self) -> str:
        """How it is computed: "primal", "dual" or "simulation"."""

    @property
    @abstractmethod
    def new_spectrum(self) -> Spectrum:
        """Spectrum of the second moments of the new features."""

    @abstractmethod
    def changes(self, dials: list[float]) -> list[Change]:
        """Delta W (rows, C) for rising values of the dial."""

    def at(self, values: Sequence[float]) -> tuple[Change, ...]:
        """The changes at any values of the dial, in any order, repeated or not."""
        rising = sorted(set(values))
        changes = dict(zip(rising, self.changes(rising), strict=True))
        return tuple(changes[value] for value in values)


def spanned(training: Training, penalty: QuadraticPenalty | None) -> bool:
    """Whether every change of weights lies in the span of the new features: no decay, penalty or Adam."""
    if penalty is not None or training.weight_decay > 0 or isinstance(training, AdamW):
        return False
    return not isinstance(training, Ridge) or training.toward == "start"


def dial_values(
    training: Mapping[str, Any],
    final: float,
    steps: Sequence[int] | None,
    time: Sequence[float] | None,
    penalty: Sequence[float] | None,
) -> tuple[str, tuple[float, ...]]:
    """The dial that was given, and its values.

    Raises:
        ValueError: a dial that this training (a record of it) does not have, no value, a value out of its range.
    """
    given = {k: v for k, v in {"steps": steps, "time": time, "penalty": penalty}.items() if v is not None}
    dial = training["dial"]
    if set(given) != {dial}:
        raise complaint(
            f"got {sorted(given) or 'nothing'}", f"values of {dial!r} for this training", f"Call at({dial}=[...])."
        )
    values = tuple(given[dial])
    if not values:
        raise complaint(f"got {dial}=[]", "at least one value", f"Call at({dial}=[...]).")
    for value in values:
        if dial != "steps":
            require_number(dial, value)
            continue
        require_integer("steps", value)
        scheduled = not isinstance(training["learning_rate"], float | int)
        if value > final and (scheduled or training.get("order") is not None):
            raise complaint(
                f"got steps={value}",
                f"at most {final:g}",
                f"The {'schedule' if scheduled else 'order'} ends there: extend it.",
            )
    return dial, values


def check_classes(training: Training, new: Features, outputs: int) -> None:
    """Raise if the loss is told to see an output that the head does not have, or not told to see a new label."""
    if training.classes is None:
        return
    if max(training.classes) >= outputs:
        raise complaint(
            f"got training.classes={training.classes} for a head of {outputs} outputs",
            f"outputs in 0 .. {outputs - 1}",
            "Grow the head first: head.grow(number_of_classes).",
        )
    if new.is_array and new.y is not None:
        check_seen(new.name, new.y, training.classes)


def check_seen(name: str, y: Tensor, classes: tuple[int, ...] | None) -> None:
    """Raise if a label is not among the outputs that the loss sees (None: all)."""
    if classes is None or y.ndim != 1:
        return
    unseen = y[~torch.isin(y, torch.tensor(classes, device=y.device))]
    if len(unseen):
        raise complaint(
            f"{name}: label {int(unseen[0])} is not among the outputs that the loss sees ({list(classes)})",
            "every new label among training.classes",
            "Add the label to training.classes, or leave it None.",
        )


def describe(training: Training) -> dict[str, Any]:
    """A training as plain values for a record: its kind, its dial and every field."""
    values = asdict(training)
    if values.get("order") is not None:
        values["order"] = [[int(i) for i in batch] for batch in values["order"]]
    return {"kind": type(training).__name__, "dial": training.dial, "loss": training.loss} | values
