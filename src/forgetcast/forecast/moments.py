"""The forecast from second moments alone: no stored sample, d^2 + d C numbers a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.forecast.modes import Modes, Order, VulnerableRank, mode_table
from forgetcast.forecast.modes import vulnerable_rank as vulnerable_rank_of
from forgetcast.forecast.path import WeightPath, check_classes, describe, dial_values
from forgetcast.forecast.penalty import QuadraticPenalty
from forgetcast.forecast.route import weight_path
from forgetcast.forecast.training import Training
from forgetcast.tangent.features import Features
from forgetcast.tangent.linear_head import LinearHead
from forgetcast.tangent.moments import Moments
from forgetcast.tangent.spectrum import Spectrum, spectrum_of_gram


@dataclass(frozen=True, eq=False)
class MomentForecast:
    r"""Expected drift and loss change of an old task of which only moments are left.

        mean squared drift = tr(Delta W^T S Delta W) / n
        ||phi W' - Y||^2 - ||phi W - Y||^2 = 2 tr(Delta W^T phi^T R) + tr(Delta W^T S Delta W),   phi^T R = S W - B

    Attributes:
        change: Delta W (rows, C).
        output_drift: (C,) mean over old samples of the squared logit change of each output.
        squared_error_before: mean over samples and outputs of the squared error now.
        squared_error: the same, forecast.
        settings: what was asked for.
    """

    change: Float[Tensor, "rows C"]
    output_drift: Float[Tensor, " C"]
    squared_error_before: float
    squared_error: float
    settings: Mapping[str, Any]
    _old: Moments
    _head: LinearHead
    _path: WeightPath

    @property
    def mean_squared_drift(self) -> float:
        """`||drift||_F^2 / n_old`: squared logit change, summed over outputs, mean over samples."""
        return float(self.output_drift.sum())

    @property
    def squared_error_change(self) -> float:
        """Forecast rise of the mean squared error (over samples and outputs)."""
        return self.squared_error - self.squared_error_before

    @cached_property
    def old_spectrum(self) -> Spectrum:
        """Spectrum of the old second moments."""
        rows = len(self.change)
        return spectrum_of_gram(self._old.gram[:rows, :rows].to(self.change.device), torch.float32)

    def at(
        self,
        steps: Sequence[int] | None = None,
        *,
        time: Sequence[float] | None = None,
        penalty: Sequence[float] | None = None,
    ) -> tuple["MomentForecast", ...]:
        """The forecast at several `steps` (descent), `time`s (flow) or `penalty`s (ridge), from one factorisation.

        Cost: 4 rows^2 C each.

        Raises:
            ValueError: a dial that this training does not have, a value out of its range.
        """
        training = self.settings["training"]
        dial, values = dial_values(training, self._path.final, steps, time, penalty)
        changes = self._path.at(values)
        settings = [{**self.settings, "training": {**training, dial: value}} for value in values]
        return tuple(
            _moment_forecast(self._old, self._head, self._path, change, own)
            for change, own in zip(changes, settings, strict=True)
        )

    def modes(self, k: int = 10) -> Modes:
        """The first `k` eigenmodes of the old Gram with the forecast drift along each."""
        return mode_table(self.old_spectrum, self.change, k)

    def vulnerable_rank(self, energy: float = 0.9, order: Order = "eigenvalue") -> VulnerableRank:
        """Fewest old modes, in `order`, that carry the share `energy` of the forecast drift."""
        return vulnerable_rank_of(self.old_spectrum, self.change, energy, order)


def forecast_moments(
    old: Moments, new: Features, head: LinearHead, training: Training, penalty: QuadraticPenalty | None = None
) -> MomentForecast:
    """Forecast mean drift and loss change of an old task from its moments. Exact, as `forecast_linear`.

    Accuracy needs the samples and is not forecast. Moments taken for fewer outputs count the new ones as target 0.

    Args:
        old: moments of the old task (`Moments.of`).
        new: features (n_new, d) and targets of the new task.
        head: the head now.
        training: how the new task will be trained.
        penalty: a quadratic penalty of that training.

    Raises:
        ValueError: moments of another width or of more outputs than the head, and all that `forecast_linear` refuses.

    Cost: that of the new task's weight change, and 2 d^2 C.
    """
    if len(old.gram) != head.width + 1 or old.cross.shape[1] > head.outputs:
        raise complaint(
            f"moments of width {len(old.gram) - 1} and {old.cross.shape[1]} outputs for a head weight of shape "
            f"{tuple(head.weight.shape)}",
            "equal widths, and no more outputs than the head",
            "Take the moments with the backbone that feeds this head.",
        )
    check_classes(training, new, head.outputs)
    path = weight_path(new, head, training, penalty)
    (change,) = path.changes([path.final])
    settings = {"training": describe(training), "penalty": penalty is not None}
    return _moment_forecast(old, head, path, change, settings)


def _moment_forecast(
    old: Moments, head: LinearHead, path: WeightPath, change: Float[Tensor, "rows C"], settings: Mapping[str, Any]
) -> MomentForecast:
    rows = len(change)
    gram = old.gram[:rows, :rows].to(change.device)
    cross = torch.nn.functional.pad(old.cross[:rows], (0, head.outputs - old.cross.shape[1])).to(change.device)
    weight = head.stacked().to(change.device)
    moved, numbers = gram @ change, old.rows * head.outputs
    energy = (change * moved).sum(0)
    before = float((weight * (gram @ weight - 2 * cross)).sum()) + old.target_square
    rise = 2 * float((weight * moved - change * cross).sum()) + float(energy.sum())
    return MomentForecast(
        change, energy / old.rows, before / numbers, (before + rise) / numbers, settings, old, head, path
    )
