"""What a forecast for a network holds: drift, accuracy, its own check, and what-ifs without data or model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.steps import Batching
from forgetcast.forecast.network.stock import Stock
from forgetcast.forecast.network.surrogate import Surrogate
from forgetcast.forecast.network.trust import Trust
from forgetcast.forecast.network.walker import Path, Place, follow
from forgetcast.forecast.path import describe
from forgetcast.forecast.result import Cost, Forecast, right, share_right
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, Training

FRONTIER_POINTS = 24


@dataclass(frozen=True, eq=False)
class Reading:
    """Old features along a predicted path.

    Attributes:
        step: how many steps the training has made.
        place: predicted parameters there.
        features: (n_old, d) that the model gives with these parameters.
    """

    step: int
    place: Place
    features: Float[Tensor, "n d"]

    @property
    def logits(self) -> Float[Tensor, "n C"]:
        """Old logits with these parameters."""
        return self.features @ self.place.weight.T + self.place.bias


@dataclass(frozen=True, eq=False)
class Frontier:
    """How much of the new task a limit on forgetting buys.

    Attributes:
        table: one row for each number of steps: `steps`, `old_accuracy`, `drop` (accuracy before - forecast), and
            `new_accuracy` (share of the new training samples answered rightly, over the outputs that the loss sees).
        max_drop: the limit.
        steps: the most steps whose forecast drop, and that of all fewer, is within the limit.
        old_accuracy: forecast there.
        new_accuracy: forecast there.
        learning_rate: of the training.
    """

    table: pd.DataFrame
    max_drop: float
    steps: int
    old_accuracy: float
    new_accuracy: float
    learning_rate: Any


@dataclass(frozen=True, eq=False, kw_only=True)
class NetworkForecast(Forecast):
    """A `Forecast` of a network, with its own check and cheap variations.

    Attributes:
        estimator: which one made it.
        trust: what it found out about itself.
        share_of_run: cost relative to the training, counted in passes forward and backward of one sample.
        readings: old features along the path, the start first.
        batching: how the training draws its samples.
        training: what was forecast.
    """

    estimator: str
    trust: Trust
    share_of_run: float
    readings: tuple[Reading, ...]
    batching: Batching
    training: Training
    _net: Network
    _surrogates: tuple[Surrogate, ...]
    _windows: tuple[int, ...] = ()
    _shares: tuple[float, ...] = ()
    _stock: Stock | None = None
    _spanning: tuple[Reading, ...] = ()

    @property
    def start(self) -> Place:
        """Parameters before the training; with the new rows placed, if that was asked for."""
        return self.readings[0].place

    @property
    def end(self) -> Place:
        """Predicted parameters after the training."""
        return self.readings[-1].place

    @property
    def trajectory(self) -> pd.DataFrame:
        """A row for each reading: steps, relative drift, and accuracy of the old samples if they have labels.

        Raises:
            ValueError: a training that is not made of steps.
        """
        if self.training.dial != "steps":
            raise complaint(
                f"the trajectory of a {type(self.training).__name__}", "a training in steps", "Read drift and accuracy."
            )
        rows = []
        size = float(self.logits_before.double().norm())
        *earlier, last = self.readings
        for step, logits in [*((reading.step, reading.logits) for reading in earlier), (last.step, self.logits)]:
            drift = float((logits - self.logits_before).double().norm())
            row: dict[str, float] = {"steps": step, "relative_drift": drift / size if size else float("inf")}
            if self.targets is not None and self.targets.ndim == 1:
                row["accuracy"] = share_right(logits, self.labels)
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def interval(self) -> tuple[float, float]:
        r"""Where the measured accuracy of the old samples is expected, with about 95 % confidence.

            accuracy +- 2 sqrt( (error of the drift x change)^2 + changed (1 - changed) / n + 1 / n^2 )

        with `changed` the share of old answers that change between right and wrong, and the error of the drift
        `sqrt(1 / expected_cosine^2 - 1)`. Exact forecasts give one point.

        Raises:
            ValueError: no old labels, or a forecast that could not check itself.
        """
        cosine = self.trust.expected_cosine
        if self.trust.exact:
            return self.accuracy, self.accuracy
        if cosine is None:
            raise complaint("a forecast without a check of its own", "one with errors measured", "Raise budget.")
        before, after = right(self.logits_before, self.labels), right(self.logits, self.labels)
        n = len(before)
        changed = max(float((before != after).double().mean()), 1 / n)
        error = (1 / cosine**2 - 1) ** 0.5
        spread = 2 * ((error * changed) ** 2 + changed * (1 - changed) / n + 1 / n**2) ** 0.5
        return max(0.0, self.accuracy - spread), min(1.0, self.accuracy + spread)

    def what_if(self, *, learning_rate: float | None = None, steps: int | None = None) -> "NetworkForecast":
        """The forecast for another learning rate or number of steps, from what is at hand.

        The training is followed again along the same surrogates, each in use over the same product of learning rate and
        steps; old features are read off the path: a displacement is a mixture of those at the readings. Touches neither
        model nor data.

        Raises:
            ValueError: an estimator without surrogates (pilot, static, linear); a schedule; more steps than a given
                order has.

        Cost: 4 n P a step with n samples an anchor; no passes.
        """
        started = perf_counter()
        training = self._variable()
        rate = training.learning_rate if learning_rate is None else learning_rate
        count = training.steps if steps is None else steps
        if not isinstance(rate, float | int):
            raise complaint(
                "a schedule of learning rates",
                "one learning rate",
                "Give learning_rate, or forecast the schedule anew.",
            )
        require_integer("steps", count)
        changed = _varied(training, float(rate), count)
        path = self._followed(changed, [count])
        place = path.places[count]
        features, unexplained = self.old_features(place)
        logits = features @ place.weight.T + place.bias
        trust = self.trust
        if trust.expected_cosine is not None:  # what could not check itself does not by being read off the path
            trust = replace(trust, surrogate_error=max(trust.surrogate_error or 0.0, unexplained))
        settings = {**self.settings, "training": describe(changed), "what_if": True}
        turns = self._timed(changed)
        return replace(
            self,
            drift=logits - self.logits_before,
            settings=settings,
            cost=Cost(perf_counter() - started, {"old": 0, "new": 0}, self.cost.form),
            trust=trust,
            share_of_run=0.0,
            readings=(self.readings[0], Reading(count, place, features)),
            training=changed,
            _surrogates=tuple(replace(near, step=turn) for near, turn in zip(self._surrogates, turns, strict=True)),
            _spanning=self._spanning or self.readings,
        )

    def safe(self, max_drop: float = 0.02) -> Frontier:
        """The most steps of this training whose forecast drop in old accuracy stays within a limit, and what they buy.

        Args:
            max_drop: accuracy before - accuracy after, at most.

        Raises:
            ValueError: as `what_if`; no old labels.
        """
        require_number("max_drop", max_drop, most=1.0)
        training = self._variable()
        steps = sorted({round(training.steps ** (k / FRONTIER_POINTS)) for k in range(1, FRONTIER_POINTS + 1)})
        steps = [0, *(step for step in steps if 0 < step < training.steps), training.steps]
        path = self._followed(training, steps)
        rows = []
        for step in dict.fromkeys(steps):
            place = path.places[step]
            features, _ = self.old_features(place)
            old = share_right(features @ place.weight.T + place.bias, self.labels)
            rows.append((step, old, self.accuracy_before - old, self._new_accuracy(step, place)))
        table = pd.DataFrame(rows, columns=["steps", "old_accuracy", "drop", "new_accuracy"])
        within = (table["drop"] <= max_drop + 1e-12).cumprod().astype(bool)
        best = table[within].iloc[-1]
        return Frontier(
            table,
            max_drop,
            int(best["steps"]),
            float(best["old_accuracy"]),
            float(best["new_accuracy"]),
            training.learning_rate,
        )

    def old_features(self, place: Place) -> tuple[Float[Tensor, "n d"], float]:
        r"""Old features at parameters near the path, and the share of the displacement that its readings do not span.

            theta - theta_0 ~ sum_k c_k (theta_k - theta_0)   =>   phi ~ phi_0 + sum_k c_k (phi_k - phi_0)

        Cost: K P.
        """
        first, *later = self._spanning or self.readings
        moved = (place.theta - first.place.theta).double()
        if not len(moved) or not later or float(moved.norm()) == 0:
            return first.features, 0.0
        basis = torch.stack([(reading.place.theta - first.place.theta).double() for reading in later])
        gram = basis @ basis.T
        mix = torch.linalg.lstsq(gram, basis @ moved[:, None], driver="gelsd" if gram.device.type == "cpu" else None)
        c = mix.solution[:, 0]
        missing = float((moved - basis.T @ c).norm() / moved.norm())
        change = sum(float(k) * (reading.features - first.features) for k, reading in zip(c, later, strict=True))
        return first.features + change, missing

    def _variable(self) -> SGD | AdamW | GradientDescent:
        if not self._surrogates or not isinstance(self.training, SGD | AdamW | GradientDescent):
            raise complaint(
                f"a what-if of a {self.estimator} forecast",
                "an anchored one, which keeps what it needs",
                "Ask for estimator='anchored' with a budget below 1.",
            )
        return self.training

    def _timed(self, training: SGD | AdamW | GradientDescent) -> list[int]:
        """From which step on each surrogate is used: at the same product of learning rate and steps."""
        was, now = self.training.learning_rate, training.learning_rate  # type: ignore[union-attr]
        scale = was / now if isinstance(was, float | int) and isinstance(now, float | int) else 1.0
        return [round(near.step * scale) for near in self._surrogates]

    def _followed(self, training: SGD | AdamW | GradientDescent, steps: Sequence[int]) -> Path:
        rising = sorted(set(steps))
        return follow(
            self._net,
            training,
            self.start,
            self._surrogates,
            rising,
            self.batching,
            self._windows,
            self._shares,
            self._timed(training),
            stock=self._stock,
        )

    def _new_accuracy(self, step: int, place: Place) -> float:
        near = [near for near in self._surrogates if near.step <= max(step - 1, 0)][-1]
        logits = near.moved(place.theta) @ place.weight.T + place.bias
        if near.objective.targets.ndim != 1:
            return float("nan")
        if self.training.classes is not None:
            hidden = torch.full_like(logits, -torch.inf)
            seen = list(self.training.classes)
            hidden[:, seen] = logits[:, seen]
            logits = hidden
        hits = right(logits, near.objective.targets.to(logits.device))
        return float((hits.double() * near.weights.double()).sum())


def _varied(training: SGD | AdamW | GradientDescent, rate: float, steps: int) -> SGD | AdamW | GradientDescent:
    """The training at another rate and number of steps; of a given order its beginning."""
    if isinstance(training, GradientDescent) or training.order is None:
        return replace(training, learning_rate=rate, steps=steps)
    if steps > len(training.order):
        raise complaint(
            f"got steps={steps}", f"at most {len(training.order)}", "The order ends there: forecast a longer one."
        )
    return replace(training, learning_rate=rate, steps=steps, order=training.order[:steps])


def read_old(net: Network, old: Samples, step: int, place: Place) -> Reading:
    """Old features of the model as it is."""
    return Reading(step, place, net.features(old.to(net.device)))


def read_at(net: Network, old: Samples, step: int, place: Place) -> Reading:
    """Old features of the model at a place; its parameters are put back."""
    with net.restored():
        net.put(place.theta, place.weight, place.bias)
        return read_old(net, old, step, place)
