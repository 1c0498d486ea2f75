"""What a forecast says, and how it compares with what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forgetcast.checks import complaint, require_finite

COLUMNS = {
    "accuracy": "share of old samples whose label has the largest logit, over all outputs of the head",
    "accuracy_error": "forecast accuracy minus measured accuracy",
    "cosine": "cosine of forecast and measured drift of the old logits, each taken as one vector",
    "one_minus_cosine": "1 - cosine, computed without cancellation",
    "relative_error": "||forecast drift - measured drift||_F / ||measured drift||_F",
    "rank_correlation": "Spearman correlation over old classes of the forecast and the measured accuracy drop",
    "vulnerable_rank": "fewest modes of the old Gram, in the order named, that carry the named share of the drift's "
    "energy ||u_j^T drift||^2; times the number of outputs it bounds the modes of the tangent kernel",
}


@dataclass(frozen=True)
class Cost:
    """What a forecast cost.

    Attributes:
        seconds: wall-clock time.
        passes: passes over the old and the new data.
        form: which form was computed: "primal", "dual", "simulation", ...
    """

    seconds: float
    passes: Mapping[str, int]
    form: str


@dataclass(frozen=True, eq=False)
class Forecast:
    """Predicted answers of the model on old samples after training on new data, before the first gradient step.

    Attributes:
        drift: (n_old, C) predicted change of the old logits.
        logits_before: (n_old, C) the old logits now.
        targets: (n_old,) labels, (n_old, C) values, or None.
        settings: what was asked for, ready for a record.
        cost: what it cost.
    """

    drift: Float[Tensor, "n C"]
    logits_before: Float[Tensor, "n C"]
    targets: Int[Tensor, " n"] | Float[Tensor, "n C"] | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    cost: Cost = field(default_factory=lambda: Cost(0.0, {}, "given"))

    @cached_property
    def logits(self) -> Float[Tensor, "n C"]:
        """Predicted old logits after the new task: `logits_before + drift`."""
        return self.logits_before + self.drift

    @property
    def labels(self) -> Int[Tensor, " n"]:
        """The old labels.

        Raises:
            ValueError: the old samples have no labels, or real-valued targets.
        """
        if self.targets is None or self.targets.ndim != 1:
            given = "no old targets" if self.targets is None else f"old targets of shape {tuple(self.targets.shape)}"
            raise complaint(given, "integer labels (n,), of which accuracy is a share", "Give labels, or read drift.")
        return self.targets.to(self.drift.device).long()

    @cached_property
    def accuracy(self) -> float:
        """Predicted share of old samples answered rightly, argmax over all outputs of the head."""
        return share_right(self.logits, self.labels)

    @cached_property
    def accuracy_before(self) -> float:
        """Share of old samples answered rightly now."""
        return share_right(self.logits_before, self.labels)

    @property
    def broken(self) -> Bool[Tensor, " n"]:
        """Which old samples are right now and predicted wrong afterwards."""
        return right(self.logits_before, self.labels) & ~right(self.logits, self.labels)

    @property
    def mean_squared_drift(self) -> float:
        """`||drift||_F^2 / n_old`: squared logit change, summed over outputs, mean over samples."""
        return float(self.drift.double().square().sum()) / len(self.drift)

    @property
    def relative_drift(self) -> float:
        """`||drift||_F / ||logits_before||_F`; infinite for logits that are zero."""
        before = float(self.logits_before.double().norm())
        return float(self.drift.double().norm()) / before if before > 0 else float("inf")

    @cached_property
    def per_class(self) -> pd.DataFrame:
        """A row for each old class: samples, accuracy before, forecast accuracy, drop (before - forecast), drift.

        `drift` is the root of the mean squared logit change of the class's samples.
        """
        labels = self.labels
        before, after = right(self.logits_before, labels), right(self.logits, labels)
        energy = self.drift.double().square().sum(1)
        columns = {"accuracy_before": before.double(), "accuracy": after.double(), "energy": energy}
        frame = pd.DataFrame({"class": labels.cpu().numpy()} | {k: v.cpu().numpy() for k, v in columns.items()})
        table = frame.groupby("class").mean()
        table.insert(0, "samples", frame.groupby("class").size())
        table["drop"] = table["accuracy_before"] - table["accuracy"]
        table["drift"] = table.pop("energy") ** 0.5
        return table

    def compare(self, measured: Float[Tensor, "n C"] | Any) -> "Calibration":
        """Hold the forecast against the old logits that were measured after the real training.

        Args:
            measured: (n_old, C) logits of the same old samples, in the same order.

        Raises:
            ValueError: another shape, NaN or infinity.
        """
        logits = torch.as_tensor(measured).detach().to(self.drift.device)
        if logits.shape != self.drift.shape:
            raise complaint(
                f"measured logits of shape {tuple(logits.shape)} for a forecast of shape {tuple(self.drift.shape)}",
                "the logits of the same old samples over the same outputs",
                "Measure on the features given as `old`, with the head that the forecast was made for.",
            )
        require_finite("measured logits", logits)
        return calibrate(self, logits)


@dataclass(frozen=True)
class Calibration:
    """Forecast against measurement. Every field is one number with one definition.

    Attributes:
        relative_error: `||forecast - measured||_F / ||measured||_F` of the drift; 0 if both are zero.
        cosine: cosine of forecast and measured drift, both as one vector; None if one of them is zero.
        one_minus_cosine: 1 - cosine without cancellation; None if one of them is zero.
        accuracy: forecast accuracy of the old samples; None without labels.
        measured_accuracy: measured accuracy; None without labels.
        accuracy_error: forecast - measured accuracy; None without labels.
        rank_correlation: Spearman correlation of the per-class accuracy drops, forecast against measured;
            None without labels or where one of them is the same for all classes.
        broken_precision: share of the answers forecast to break that did; None if none was forecast.
        broken_recall: share of the answers that broke that were forecast to; None if none broke.
    """

    relative_error: float
    cosine: float | None
    one_minus_cosine: float | None
    accuracy: float | None
    measured_accuracy: float | None
    accuracy_error: float | None
    rank_correlation: float | None
    broken_precision: float | None
    broken_recall: float | None


def calibrate(forecast: Forecast, logits: Float[Tensor, "n C"]) -> Calibration:
    """The calibration of `forecast` against measured old logits."""
    predicted = forecast.drift.double()
    measured = logits.double() - forecast.logits_before.double()
    sizes = float(predicted.norm()), float(measured.norm())
    error = float((predicted - measured).norm())
    gap = None
    if min(sizes) > 0:
        gap = 0.5 * float((predicted / sizes[0] - measured / sizes[1]).square().sum())
    drift_fields = (
        (error / sizes[1] if sizes[1] > 0 else (0.0 if error == 0 else float("inf"))),
        None if gap is None else 1 - gap,
        gap,
    )
    if forecast.targets is None or forecast.targets.ndim != 1:
        return Calibration(*drift_fields, None, None, None, None, None, None)
    labels = forecast.labels
    before, after = right(forecast.logits_before, labels), right(forecast.logits, labels)
    actual = right(logits, labels)
    foretold, broken = before & ~after, before & ~actual
    hits = int((foretold & broken).sum())
    accuracy = forecast.accuracy, share_right(logits, labels)
    return Calibration(
        *drift_fields,
        *accuracy,
        accuracy[0] - accuracy[1],
        _rank_correlation(labels, before.double() - after.double(), before.double() - actual.double()),
        hits / int(foretold.sum()) if bool(foretold.any()) else None,
        hits / int(broken.sum()) if bool(broken.any()) else None,
    )


def right(logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Which samples have their label as the largest logit."""
    return logits.argmax(1) == labels


def share_right(logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> float:
    """Accuracy: share of samples whose label has the largest logit."""
    return float(right(logits, labels).double().mean())


def _rank_correlation(labels: Tensor, forecast: Tensor, measured: Tensor) -> float | None:
    frame = pd.DataFrame({"c": labels.cpu().numpy(), "f": forecast.cpu().numpy(), "m": measured.cpu().numpy()})
    drops = frame.groupby("c").mean()
    if drops["f"].nunique() < 2 or drops["m"].nunique() < 2:
        return None
    return float(drops["f"].rank().corr(drops["m"].rank()))  # Spearman's, without the second that scipy.stats takes
