"""Points told apart: all are read on a few old samples, and those that are still in question on more and more."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from forgetcast.forecast.network.candidates import Candidate
from forgetcast.forecast.network.choice import Point, choose, exceeds
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.plan import FORWARD
from forgetcast.forecast.network.probes import Answers, Probe, smoothed
from forgetcast.forecast.network.result import read_at
from forgetcast.forecast.network.trust import Trust
from forgetcast.forecast.network.walker import Place

SURE = 2.5
"""Standard errors beyond which a difference is taken for one."""
GROWTH = 1.5
LEAST_MORE = 8


@dataclass(eq=False)
class Entrant:
    """A point in question.

    Attributes:
        candidate: what trains.
        net: the model with it.
        length: share of the way.
        place: parameters there.
        share_of_run: what its forecast and its readings have cost, relative to its training.
        trust: of its forecast.
        old: answers to the old samples read so far.
        new: answers to the new samples.
        behind: when it was given up, whom it was behind, and after how many old samples.
    """

    candidate: Candidate
    net: Network
    length: float
    place: Place
    share_of_run: float
    trust: Trust
    old: Answers
    new: Answers
    behind: tuple["Entrant", int] | None = None

    @property
    def moves(self) -> bool:
        """Whether reading it takes a pass: not where the features are those of the start."""
        return bool(self.net.body) and self.length > 0

    def read(self, probe: Probe) -> Answers:
        """Its answers. Cost: one forward pass, if it moves."""
        return probe.answers(logits_at(self.net, probe, self.place, self.moves))

    def kept(self, count: int) -> tuple[float, float]:
        """Accuracy of the first so many old samples, counted and smoothed."""
        own = self.old.first(count)
        return float(own.right.mean()), float(smoothed(own.margins).mean())

    def told(self) -> tuple[float, float]:
        """The same of all that were read.

        One that was given up is told by its distance to whom it was behind, on the samples that both had met: it does
        not win in the end for having met easier ones.
        """
        if self.behind is None:
            return self.kept(len(self.old))
        ahead, count = self.behind
        now, then, own = ahead.told(), ahead.kept(count), self.kept(count)
        return now[0] + own[0] - then[0], now[1] + own[1] - then[1]

    def point(self, accuracy_before: float, old_weight: float) -> Point:
        """As it stands."""
        counted, smooth = self.told()
        counted = min(max(counted, 0.0), 1.0)
        return Point(
            self.candidate,
            self.length,
            sum(parameter.numel() for parameter in (*self.net.body.values(), *self.net.of_head.values())),
            counted,
            accuracy_before - counted,
            float(self.new.right.mean()),
            old_weight * smooth + (1 - old_weight) * float(smoothed(self.new.margins).mean()),
            self.share_of_run,
            len(self.old),
            self.trust.trusted,
            self.trust.reason,
        )


@dataclass(frozen=True)
class Rules:
    """By which a race is decided.

    Attributes:
        accuracy_before: of the old samples, now.
        old_weight: of the old accuracy in the scores.
        max_drop: the limit, or None.
    """

    accuracy_before: float
    old_weight: float
    max_drop: float | None

    def points(self, entrants: Sequence[Entrant]) -> list[Point]:
        """One for each."""
        return [entrant.point(self.accuracy_before, self.old_weight) for entrant in entrants]

    def leader(self, running: Sequence[Entrant]) -> Entrant:
        """Who would be chosen now."""
        points = self.points(running)
        return running[points.index(choose(points, self.max_drop))]

    def out(self, entrant: Entrant, leader: Entrant) -> bool:
        """Whether one will not be chosen, as far as `SURE` standard errors tell, however many samples are read.

        It is surely beyond the limit; or surely of a lower score than a leader that is surely within it. Where nobody
        is within the limit, it surely drops more than the leader.
        """
        if self.max_drop is None:
            return self._behind(entrant, leader)
        if exceeds(self.accuracy_before - leader.told()[0], self.max_drop):
            return _above_zero([(1.0, leader.old.right - entrant.old.right)])
        kept = self.accuracy_before - self.max_drop
        safe = _above_zero([(1.0, leader.old.right - kept)])
        return _above_zero([(1.0, kept - entrant.old.right)]) or (safe and self._behind(entrant, leader))

    def _behind(self, entrant: Entrant, leader: Entrant) -> bool:
        old = smoothed(leader.old.margins) - smoothed(entrant.old.margins)
        new = smoothed(leader.new.margins) - smoothed(entrant.new.margins)
        return _above_zero([(self.old_weight, old), (1 - self.old_weight, new)])


def race(entrants: Sequence[Entrant], old: Probe, rules: Rules, allowance: float, run: float) -> int:
    """Read more old samples at the points in question, half as many again each time, until one is left.

    What is not to be chosen any more is given up (`Entrant.behind`).

    Args:
        entrants: at least one; all have read the same first samples.
        old: all old samples.
        rules: by which it is decided.
        allowance: what the readings may cost, in passes forward and backward of one sample.
        run: what one training costs, in the same units.

    Returns:
        How many samples were read, points together.

    Cost: one forward pass over these.

    Source: racing, Maron and Moore 1994 (Hoeffding races); by errors of paired differences, Moore and Lee 1994.
    """
    running, met, passed = list(entrants), len(entrants[0].old), 0
    while met < len(old):
        leader = rules.leader(running)
        for entrant in running:
            if entrant is not leader and rules.out(entrant, leader):
                entrant.behind = leader, met
        running = [entrant for entrant in running if entrant.behind is None]
        moving = sum(entrant.moves for entrant in running)
        left = len(old) - met
        more = min(ceil((GROWTH - 1) * met), left)
        if moving:
            more = min(more, int((allowance / FORWARD - passed) / moving))
        if len(running) == 1 or more < min(LEAST_MORE, left):
            break
        part = old.part(met, met + more)
        for entrant in running:
            entrant.old = entrant.old.then(entrant.read(part))
            if entrant.moves:
                entrant.share_of_run += FORWARD * more / run
        passed, met = passed + moving * more, met + more
    return passed


def logits_at(net: Network, probe: Probe, place: Place, moves: bool) -> Tensor:
    """Logits (n, C) at a place; where the body does not move there, without a pass."""
    if moves:
        return read_at(net, probe.samples, 0, place).logits
    return probe.features @ place.weight.T + place.bias


def _above_zero(parts: Sequence[tuple[float, Tensor]]) -> bool:
    """Whether a weighted sum of means is above zero by more than `SURE` standard errors."""
    mean = sum(weight * float(values.mean()) for weight, values in parts)
    variance = sum(weight**2 * float(values.var(correction=0)) / len(values) for weight, values in parts)
    return bool(mean > SURE * variance**0.5)
