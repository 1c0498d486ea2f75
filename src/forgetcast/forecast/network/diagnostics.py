r"""Forecast and measured drift of the old outputs side by side: by sample, by class, by direction, by mode."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from forgetcast.checks import complaint
from forgetcast.forecast.network_modes import NetworkModes
from forgetcast.forecast.result import Calibration, Forecast, right


@dataclass(frozen=True, eq=False)
class DriftComparison:
    """Forecast and measured drift of the old outputs.

    Attributes:
        calibration: all of it in single numbers.
        per_sample: a row for each old sample: `predicted` and `measured` size of its drift, their `cosine` (NaN where
            one of them is zero). With labels also `label`, the change of its margin (logit of the label minus the
            largest other), `margin_predicted` and `margin_measured`, and whether its answer turns from right to wrong,
            `broken_predicted` and `broken_measured`.
        per_class: a row for each old class: `samples`, mean rise of the cross-entropy over all outputs,
            `rise_predicted` and `rise_measured`, and `accuracy_before`, `accuracy_predicted`, `accuracy_measured`. None
            without labels.
        per_direction: a row for each direction v_k in the space of outputs, along which samples were measured to move,
            the most energetic first: share of the energy `||drift v_k||^2 / ||drift||^2`, `predicted` and `measured`,
            and the `cosine` over samples of both drifts along it (NaN where one of them is zero).
        directions: (k, C) v_k, the right singular vectors of the measured drift.
        per_mode: a row for each of `modes`: `eigenvalue` of the old tangent kernel, and the share of the energy
            `<u_j, drift>^2 / ||drift||^2`, `predicted` and `measured`. None where no modes were given.
    """

    calibration: Calibration
    per_sample: pd.DataFrame
    per_class: pd.DataFrame | None
    per_direction: pd.DataFrame
    directions: Float[Tensor, "k C"]
    per_mode: pd.DataFrame | None


def compare_drift(forecast: Forecast, measured: Any, modes: NetworkModes | None = None) -> DriftComparison:
    """Hold the forecast drift of every old sample against what was measured after the real training.

    Args:
        forecast: any; of a network or of a linear head.
        measured: (n_old, C) logits of the same old samples, in the same order.
        modes: of the old tangent kernel at the same samples, from `network_modes`.

    Returns:
        Tables in float64. Shares of a drift that is zero are 0.

    Raises:
        ValueError: another shape, NaN or infinity; modes of other samples.

    Cost: one singular value decomposition of an n x C matrix.
    """
    calibration = forecast.compare(measured)
    before = forecast.logits_before.detach().double().cpu()
    predicted = forecast.drift.detach().double().cpu()
    actual = torch.as_tensor(measured).detach().double().cpu() - before
    labels = None
    if forecast.targets is not None and forecast.targets.ndim == 1:
        labels = forecast.labels.cpu()
    directions = torch.linalg.svd(actual, full_matrices=False).Vh
    return DriftComparison(
        calibration,
        _by_sample(before, predicted, actual, labels),
        None if labels is None else _by_class(before, predicted, actual, labels),
        _by_direction(predicted, actual, directions),
        directions,
        None if modes is None else _by_mode(predicted, actual, modes),
    )


def _by_sample(before: Tensor, predicted: Tensor, actual: Tensor, labels: Tensor | None) -> pd.DataFrame:
    columns = {
        "predicted": predicted.norm(dim=1),
        "measured": actual.norm(dim=1),
        "cosine": _cosines(predicted, actual),
    }
    if labels is not None:
        was, now = right(before, labels), margins(before, labels)
        columns["label"] = labels
        for way, drift in (("predicted", predicted), ("measured", actual)):
            columns[f"margin_{way}"] = margins(before + drift, labels) - now
            columns[f"broken_{way}"] = was & ~right(before + drift, labels)
    return pd.DataFrame({name: column.numpy() for name, column in columns.items()}).rename_axis("sample")


def _by_class(before: Tensor, predicted: Tensor, actual: Tensor, labels: Tensor) -> pd.DataFrame:
    def losses(logits: Tensor) -> Tensor:
        return cross_entropy(logits, labels, reduction="none")

    columns = {
        "rise_predicted": losses(before + predicted) - losses(before),
        "rise_measured": losses(before + actual) - losses(before),
        "accuracy_before": right(before, labels).double(),
        "accuracy_predicted": right(before + predicted, labels).double(),
        "accuracy_measured": right(before + actual, labels).double(),
    }
    frame = pd.DataFrame({"class": labels.numpy()} | {name: column.numpy() for name, column in columns.items()})
    table = frame.groupby("class").mean()
    table.insert(0, "samples", frame.groupby("class").size())
    return table


def _by_direction(predicted: Tensor, actual: Tensor, directions: Tensor) -> pd.DataFrame:
    along = predicted @ directions.T, actual @ directions.T
    table = {
        "predicted": _shares(along[0].square().sum(0), predicted),
        "measured": _shares(along[1].square().sum(0), actual),
        "cosine": _cosines(along[0].T, along[1].T),
    }
    return pd.DataFrame({name: column.numpy() for name, column in table.items()}).rename_axis("direction")


def _by_mode(predicted: Tensor, actual: Tensor, modes: NetworkModes) -> pd.DataFrame:
    if modes.patterns.shape[1:] != predicted.shape:
        raise complaint(
            f"modes over {tuple(modes.patterns.shape[1:])} old outputs for a forecast of {tuple(predicted.shape)}",
            "modes of the forecast's own old samples and outputs",
            "Compute them with the `old` that was given to the forecast.",
        )
    table = {
        "eigenvalue": modes.eigenvalues,
        "predicted": _shares(modes.energy_of(predicted), predicted),
        "measured": _shares(modes.energy_of(actual), actual),
    }
    return pd.DataFrame({name: column.cpu().numpy() for name, column in table.items()}).rename_axis("mode")


def margins(logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Logit of the label minus the largest other: positive where the answer is right."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def _shares(energy: Tensor, drift: Tensor) -> Tensor:
    total = float(drift.square().sum())
    return energy / total if total > 0 else torch.zeros_like(energy)


def _cosines(left: Tensor, right: Tensor) -> Tensor:
    """Of the rows of one with those of the other; NaN where one of them is zero."""
    sizes: Tensor = left.norm(dim=1) * right.norm(dim=1)
    return (left * right).sum(1) / sizes
