"""Where a training takes a linear head: the one place that picks closed form or simulation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.forecast.closed_form import closed_path, read
from forgetcast.forecast.penalty import QuadraticPenalty
from forgetcast.forecast.simulate import simulate_full_batch, simulate_minibatch
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, Ridge, Training, is_closed_form
from forgetcast.tangent.features import Features, check_targets
from forgetcast.tangent.linear_head import LinearHead, check_width, with_bias
from forgetcast.tangent.spectrum import Spectrum, spectrum_of

Change = Float[Tensor, "rows C"]


@dataclass(frozen=True, eq=False)
class WeightPath:
    """Where a training takes the head: `changes(dials)` gives Delta W (rows, C) for rising values of the dial.

    Attributes:
        changes: from rising dial values to weight changes.
        final: the value of the dial at the end of the training.
        new_spectrum: makes the spectrum of the new features.
        form: how it is computed.
        within_new: whether every change lies in the span of the new features (no decay, penalty or Adam).
    """

    changes: Callable[[list[float]], list[Change]]
    final: float
    new_spectrum: Callable[[], Spectrum]
    form: str
    within_new: bool

    def at(self, values: Sequence[float]) -> tuple[Change, ...]:
        """The changes at any values of the dial, in any order, repeated or not."""
        rising = sorted(set(values))
        changes = dict(zip(rising, self.changes(rising), strict=True))
        return tuple(changes[value] for value in values)


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


def weight_path(new: Features, head: LinearHead, training: Training, penalty: QuadraticPenalty | None) -> WeightPath:
    """Where `training` on `new` takes the head: closed form for full-batch squared loss, else simulation."""
    weight = head.stacked()
    if penalty is not None and (penalty.root.shape[1], penalty.target.shape[1]) != tuple(weight.shape):
        raise complaint(
            f"a penalty on weights of shape ({penalty.root.shape[1]}, {penalty.target.shape[1]}) for a head of shape "
            f"{tuple(weight.shape)} (bias included)",
            "equal shapes",
            "Build the penalty with this head, and grow both to the same number of outputs.",
        )
    within_new = penalty is None and training.weight_decay == 0 and not isinstance(training, AdamW)
    if isinstance(training, Ridge):
        within_new = within_new and training.toward == "start"
    if is_closed_form(training):
        path = closed_path(training, read(new, head), weight, penalty)
        form = "dual" if not path.new_spectrum.complete else "primal"
        final = float(getattr(training, training.dial))
        return WeightPath(path.changes, final, lambda: path.new_spectrum, form, within_new)
    if new.shuffled and isinstance(training, SGD | AdamW):
        raise complaint(
            f"{new.name}: a DataLoader with shuffle=True for a replay of minibatches",
            "the samples in the order that training.seed or training.order refers to",
            "Give a DataLoader with shuffle=False, or arrays.",
        )
    phi, y = new.gather()
    check_width(new.name, phi, head)
    y = check_targets(new.name, y, head.outputs)
    extended = with_bias(phi, len(weight))
    weight = weight.to(phi.device)

    def changes(dials: list[float]) -> list[Change]:
        steps = [int(dial) for dial in dials]
        # A shorter or longer run of the same training: the schedule and order are prefixes, nothing else changes.
        if isinstance(training, GradientDescent):
            return simulate_full_batch(training, extended, y, weight, penalty, steps)
        return simulate_minibatch(training, extended, y, weight, penalty, steps)

    gathered = Features(phi, y, new.block_rows, new.name)
    return WeightPath(changes, training.steps, lambda: spectrum_of(gathered, len(weight)), "simulation", within_new)


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
    if new.is_array and new.y is not None and new.y.ndim == 1:
        unseen = new.y[~torch.isin(new.y, torch.tensor(training.classes, device=new.y.device))]
        if len(unseen):
            raise complaint(
                f"{new.name}: label {int(unseen[0])} is not among the outputs that the loss sees ({training.classes})",
                "every new label among training.classes",
                "Add the label to training.classes, or leave it None.",
            )


def describe(training: Training) -> dict[str, Any]:
    """A training as plain values for a record: its kind, its dial and every field."""
    values = asdict(training)
    if values.get("order") is not None:
        values["order"] = [[int(i) for i in batch] for batch in values["order"]]
    return {"kind": type(training).__name__, "dial": training.dial, "loss": training.loss} | values
