"""Old and new accuracy along the way to where a training is forecast to take a model."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.forecast.network.candidates import Candidate
from forgetcast.forecast.network.draw import draw
from forgetcast.forecast.network.given import Given, Outputs
from forgetcast.forecast.network.head import Network, probed
from forgetcast.forecast.network.outputs import renumbered
from forgetcast.forecast.network.plan import FORWARD
from forgetcast.forecast.network.probes import Probe, allowed_answers, balanced_order
from forgetcast.forecast.network.race import Entrant, logits_at
from forgetcast.forecast.network.result import NetworkForecast
from forgetcast.forecast.network.samples import Samples, samples_of
from forgetcast.forecast.network.start import Start
from forgetcast.forecast.network.walker import Place, batching_of
from forgetcast.forecast.training import SGD, AdamW, GradientDescent
from forgetcast.tangent.features import check_labels

LEAST_NEW = 32
NEW_SHARE = 1 / 6
READING_SHARE = 1 / 2
"""Of a candidate's budget: what reading new samples may take, if there are enough of them, and what all readings that
every point takes may."""
RACE_SHARE = 1 / 2
"""Of what these leave: what telling the best points apart may take (`race`)."""
FIRST_OLD = 128
"""Old samples that every forecast and every point is read on."""


@dataclass(frozen=True, eq=False)
class Judge:
    """Reads points.

    Attributes:
        old: the old samples, with the answers that are possible after the training.
        first: how many of them every point is read on.
        new: the new samples that are read.
        accuracy_before: of the old samples, now.
        lengths: of the way.
        budget: of a candidate, readings included, as a share of its training.
        run: cost of a training.
    """

    old: Probe
    first: int
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
        readings = self._readings()
        if readings > READING_SHARE * self.budget * self.run:
            raise complaint(
                f"budget={self.budget:g} with {len(self.lengths)} lengths at which {self.first} old and "
                f"{len(self.new)} new samples are read",
                f"at least {ceil(1000 * readings / READING_SHARE / self.run) / 1000:g}",
                "Raise budget, or give fewer lengths or old samples.",
            )
        return self.budget - (readings + self.reserve(net)) / self.run

    def reserve(self, net: Network) -> float:
        """What a candidate puts by for the race of the points, in passes of one sample."""
        if self.budget >= 1 or not net.body:
            return 0.0
        most = FORWARD * (len(self.old) - self.first) * self._moving()
        return min(RACE_SHARE * max(self.budget * self.run - self._readings(), 0.0), most)

    def _readings(self) -> float:
        """What reading all lengths of a candidate on the new and the first old samples takes."""
        count = self._moving()
        return FORWARD * (len(self.new) * count + self.first * (count - (1.0 in self.lengths)))

    def _moving(self) -> int:
        return len(self.lengths) - (0.0 in self.lengths)

    def entrants(self, net: Network, candidate: Candidate, found: NetworkForecast) -> tuple[list[Entrant], int, int]:
        """One for each length, read on the first old samples; and how many old and new samples that took.

        At the whole length the old answers are the forecast's own. A forecast at the tangent of the start is linear in
        the length.
        """
        few = self.old.part(0, self.first)
        entrants, of_old, of_new = [], 0, 0
        for length in self.lengths:
            place = _between(found.start, found.end, length)
            moves = bool(net.body) and length > 0
            if length == 1 or found.estimator == "static":
                logits = found.logits_before + length * found.drift
            else:
                logits = logits_at(net, few, place, moves)
                of_old += moves * len(few)
            new = self.new.answers(logits_at(net, self.new, place, moves))
            of_new += moves * len(self.new)
            old = few.answers(logits)
            entrants.append(Entrant(candidate, net, length, place, found.share_of_run, found.trust, old, new))
        for entrant in entrants:
            entrant.share_of_run += FORWARD * (of_old + of_new) / self.run if self.run else 0.0
        return entrants, of_old, of_new


def judge(
    asked: Given,
    start: Start,
    *,
    lengths: tuple[float, ...],
    budget: float,
    first: int,
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
        first: old samples that every point is read on.
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
    now, then = (
        allowed_answers("answers_now", answers[0], *of_old),
        allowed_answers("answers_then", answers[1], *of_old),
    )
    allowed = allowed_answers("answers_new", answers[2], *of_new)
    run, count = steps_cost(asked), min(most, len(pool))
    if budget < 1 and run:
        readings = max(1, len(lengths) - (0.0 in lengths))
        count = min(count, max(LEAST_NEW, int(NEW_SHARE * budget * run / FORWARD / readings)))
    taken = torch.sort(draw(pool_labels, len(pool), None, seed).anchor(0, count)[0]).values
    part = pool.at(taken)
    known = start.new if validation is None else None
    features = net.features(part.to(net.device)) if known is None else known[taken.to(known.device)]
    before = Probe(old, labels, start.old, now).answers(start.old @ net.weight().T + net.bias())
    asked_of_all = Probe(old, labels, start.old, then)
    return Judge(
        asked_of_all if first == len(old) else asked_of_all.at(balanced_order(labels, seed)),
        first,
        Probe(part, pool_labels[taken], features, allowed[taken]),
        float(before.right.mean()),
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


def _between(start: Place, end: Place, length: float) -> Place:
    """The point at `length` of the way; the ends exactly."""
    return Place(*(torch.lerp(a, b, length) for a, b in zip(start.parts, end.parts, strict=True)))
