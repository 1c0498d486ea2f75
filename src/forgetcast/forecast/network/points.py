"""Old and new accuracy along the way to where a training is forecast to take a model."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.forecast.network.candidates import Candidate
from forgetcast.forecast.network.choice import Point
from forgetcast.forecast.network.draw import draw
from forgetcast.forecast.network.given import Given, Outputs
from forgetcast.forecast.network.head import Network, probed
from forgetcast.forecast.network.outputs import renumbered
from forgetcast.forecast.network.plan import FORWARD
from forgetcast.forecast.network.result import NetworkForecast, read_at
from forgetcast.forecast.network.samples import Samples, samples_of
from forgetcast.forecast.network.start import Start
from forgetcast.forecast.network.walker import Place, batching_of
from forgetcast.forecast.training import SGD, AdamW, GradientDescent
from forgetcast.tangent.features import check_labels

LEAST_NEW = 32
NEW_SHARE = 1 / 6
READING_SHARE = 1 / 2
"""Of a candidate's budget: what reading new samples may take, if there are enough of them; what all readings may."""


def smoothed_accuracy(margins: Float[Tensor, " n"]) -> float:
    r"""Share of margins above 0, as the integral of a kernel density estimate of them.

        mean_i Phi(m_i / h),     h = 1.06 std(m) n^(-1/3)

    A sample near the boundary counts as part right and part wrong. Of two models that answer alike but for a few
    samples this tells the better one from fewer samples than counting does; the rate n^(-1/3) is that of the least
    squared error of an estimated distribution function.

    Args:
        margins: (n,) logit of the label minus the largest other; infinite where there is no other.

    Source: Azzalini 1981, Biometrika 68.
    """
    finite = margins[torch.isfinite(margins)].double()
    width = 1.06 * float(finite.std(correction=0)) * len(margins) ** (-1 / 3) if len(finite) > 1 else 0.0
    if width <= 0:
        return float((margins > 0).double().mean())
    return float(torch.special.ndtr(margins.double() / width).mean())


@dataclass(frozen=True, eq=False)
class Probe:
    """Samples whose accuracy is read at every point.

    Attributes:
        samples: with their labels.
        labels: (n,)
        features: (n, d) at the start.
        allowed: (n, C), among which outputs an answer is chosen.
    """

    samples: Samples
    labels: Int[Tensor, " n"]
    features: Float[Tensor, "n d"]
    allowed: Bool[Tensor, "n C"]

    def accuracy(self, logits: Float[Tensor, "n C"]) -> float:
        """Share of answers that are right."""
        best = self._possible(logits).argmax(1)
        return float((best == self.labels.to(best.device)).double().mean())

    def smoothed(self, logits: Float[Tensor, "n C"]) -> float:
        """`smoothed_accuracy` of the margins."""
        possible, labels = self._possible(logits), self.labels.to(logits.device)[:, None]
        own = possible.gather(1, labels)[:, 0]
        return smoothed_accuracy(own - possible.scatter(1, labels, -torch.inf).amax(1))

    def _possible(self, logits: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        return logits.masked_fill(~self.allowed.to(logits.device), -torch.inf)


@dataclass(frozen=True, eq=False)
class Judge:
    """Reads points.

    Attributes:
        old: the old samples, with the answers that are possible after the training.
        new: the new samples that are read.
        accuracy_before: of the old samples, now.
        lengths: of the way.
        budget: of a candidate, readings included, as a share of its training.
        run: cost of a training.
    """

    old: Probe
    new: Probe
    accuracy_before: float
    lengths: tuple[float, ...]
    budget: float
    run: float

    def left(self, net: Network) -> float:
        """What the readings leave of a candidate's budget.

        Raises:
            ValueError: less than half.
        """
        if self.budget >= 1 or not self.run or not net.body:
            return self.budget
        count = len(self.lengths) - (0.0 in self.lengths)
        readings = FORWARD * (len(self.new.labels) * count + len(self.old.labels) * (count - (1.0 in self.lengths)))
        if readings > READING_SHARE * self.budget * self.run:
            raise complaint(
                f"budget={self.budget:g} with {len(self.lengths)} lengths at which {len(self.old.labels)} old and "
                f"{len(self.new.labels)} new samples are read",
                f"at least {ceil(1000 * readings / READING_SHARE / self.run) / 1000:g}",
                "Raise budget, or give fewer lengths or old samples.",
            )
        return self.budget - readings / self.run

    def points(
        self, net: Network, candidate: Candidate, found: NetworkForecast, old_weight: float
    ) -> tuple[list[Point], dict[str, int]]:
        """One point for each length, and how many old and new samples were read.

        At the whole length the old accuracy is the forecast's own. A forecast at the tangent of the start is linear in
        the length.
        """
        trained = sum(parameter.numel() for parameter in (*net.body.values(), *net.of_head.values()))
        accuracies, read = [], {"old": 0, "new": 0}
        for length in self.lengths:
            place = _between(found.start, found.end, length)
            moves = bool(net.body) and length > 0
            if length == 1 or found.estimator == "static":
                logits = found.logits_before + length * found.drift
            else:
                logits = _logits(net, self.old, place, moves)
                read["old"] += moves * len(self.old.labels)
            new = _logits(net, self.new, place, moves)
            read["new"] += moves * len(self.new.labels)
            score = old_weight * self.old.smoothed(logits) + (1 - old_weight) * self.new.smoothed(new)
            accuracies.append((length, self.old.accuracy(logits), self.new.accuracy(new), score))
        share = found.share_of_run + (FORWARD * sum(read.values()) / self.run if self.run else 0.0)
        points = [
            Point(
                candidate,
                length,
                trained,
                kept,
                self.accuracy_before - kept,
                reached,
                score,
                share,
                found.trust.trusted,
                found.trust.reason,
            )
            for length, kept, reached, score in accuracies
        ]
        return points, read


def judge(
    asked: Given,
    start: Start,
    *,
    lengths: tuple[float, ...],
    budget: float,
    most: int,
    validation: Any,
    outputs: Outputs,
    answers: tuple[Tensor | None, Tensor | None, Tensor | None],
    seed: int,
) -> Judge:
    """Choose the new samples, and read them and the old answers at the start, at which the model stands.

    Args:
        asked: with all that may train.
        start: as read.
        lengths: as for `advise`, like all below.
        budget: in the same units.
        most: new samples.
        validation: or None.
        outputs: by which labels of `validation` are numbered.
        answers: to the old samples now and then, and to the new ones.
        seed: of the draw.

    Raises:
        ValueError: samples without labels, answers that do not fit.

    Cost: one pass over the new samples that are read, unless `start` has their features.
    """
    net, old = asked.net, asked.old
    labels = check_labels("old", old.targets, net.outputs)
    pool = asked.new if validation is None else _validation(asked, validation, outputs)
    pool_labels = check_labels(pool.name, pool.targets, net.outputs)
    of_old, of_new = (labels, net.outputs), (pool_labels, net.outputs)
    now, then = _allowed("answers_now", answers[0], *of_old), _allowed("answers_then", answers[1], *of_old)
    new = _allowed("answers_new", answers[2], *of_new)
    run, count = steps_cost(asked), min(most, len(pool))
    if budget < 1 and run:
        readings = max(1, len(lengths) - (0.0 in lengths))
        count = min(count, max(LEAST_NEW, int(NEW_SHARE * budget * run / FORWARD / readings)))
    taken = torch.sort(draw(pool_labels, len(pool), None, seed).anchor(0, count)[0]).values
    part = pool.at(taken)
    known = start.new if validation is None else None
    features = net.features(part.to(net.device)) if known is None else known[taken.to(known.device)]
    before = start.old @ net.weight().T + net.bias()
    return Judge(
        Probe(old, labels, start.old, then),
        Probe(part, pool_labels[taken], features, new[taken]),
        Probe(old, labels, start.old, now).accuracy(before),
        lengths,
        budget,
        run,
    )


def steps_cost(asked: Given) -> float:
    """What the training costs, in passes forward and backward of one sample; 0 for one that is not made of steps."""
    training = asked.training
    if not isinstance(training, SGD | AdamW | GradientDescent):
        return 0.0
    return training.steps * round(batching_of(training, len(asked.new)).size)


def label_share(asked: Given) -> float:
    """Old labels / (old labels + new labels): the weight with which every class of either side counts alike."""
    counts = [
        len(set(check_labels(part.name, part.targets, asked.net.outputs).tolist())) for part in (asked.old, asked.new)
    ]
    return counts[0] / sum(counts)


def _validation(asked: Given, validation: Any, outputs: Outputs) -> Samples:
    samples = samples_of("validation", validation)
    if outputs is not None and not callable(outputs):
        samples = renumbered(samples, outputs)
    few = samples.at(torch.arange(min(2, len(samples)))).to(asked.net.device)
    probed(asked.net.model, few, asked.net.read)
    return samples


def _allowed(name: str, given: Tensor | None, labels: Tensor, outputs: int) -> Bool[Tensor, "n C"]:
    """Among which outputs each answer is chosen; every label has to be one of them."""
    if given is None:
        return torch.ones(len(labels), outputs, dtype=torch.bool)
    allowed = torch.as_tensor(given).cpu()
    fits = allowed.ndim == 2 and allowed.dtype == torch.bool and len(allowed) in (1, len(labels))
    if not fits or allowed.shape[1] != outputs:
        raise complaint(
            f"{name} of shape {tuple(allowed.shape)}, {allowed.dtype}",
            f"booleans of shape ({len(labels)}, {outputs}) or (1, {outputs})",
            "Give one row for each sample, or one for all, with one column for each output.",
        )
    allowed = allowed.expand(len(labels), -1)
    missing = (~allowed[torch.arange(len(labels)), labels.cpu()]).nonzero()
    if len(missing):
        raise complaint(
            f"{name} without the label of {len(missing)} samples, the first at {int(missing[0])}",
            "answers that can be right",
            "Allow each sample's own label.",
        )
    return allowed


def _between(start: Place, end: Place, length: float) -> Place:
    """The point at `length` of the way; the ends exactly."""
    return Place(*(torch.lerp(a, b, length) for a, b in zip(start.parts, end.parts, strict=True)))


def _logits(net: Network, probe: Probe, place: Place, moves: bool) -> Float[Tensor, "n C"]:
    """Logits at a place; where the body does not move there, no pass."""
    if moves:
        return read_at(net, probe.samples, 0, place).logits
    return probe.features @ place.weight.T + place.bias
