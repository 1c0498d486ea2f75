"""`advise`: how many parameters to train, and how far to go, chosen by what is forecast of each choice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import pandas as pd
from jaxtyping import Bool
from torch import Tensor, nn

from forgetcast.checks import complaint, require_choice, require_integer, require_number
from forgetcast.forecast.network.candidates import Candidate, narrowed, nested
from forgetcast.forecast.network.choice import Point, choose, exceeds, non_dominated, told
from forgetcast.forecast.network.entry import ESTIMATORS, Estimator, chosen_estimator, forecast_from
from forgetcast.forecast.network.given import Given, Outputs, given
from forgetcast.forecast.network.head import Restraint
from forgetcast.forecast.network.plan import FORWARD
from forgetcast.forecast.network.points import FIRST_OLD, Judge, judge, label_share, steps_cost
from forgetcast.forecast.network.race import Entrant, Rules, race
from forgetcast.forecast.network.result import NetworkForecast
from forgetcast.forecast.network.start import Head, read_start
from forgetcast.forecast.network.within import contains, forecast_within, reading_cost
from forgetcast.forecast.result import Cost
from forgetcast.forecast.training import Training
from forgetcast.tangent.jacobian import Choice

ROWS_IN_USE = 256
"""At most: more than of a forecast, whose what-ifs they would slow; with 256 instead of 64 the accuracies of a ViT
after the whole way came 2 to 6 points nearer, which few samples had made too low."""
MOST_SHARED = 0.9
"""Of a training, what anchors that serve several sets may cost: from 1 on a forecast is the run and has none."""


@dataclass(frozen=True, eq=False)
class Advice:
    """What is forecast of every candidate, and which of them to train.

    Attributes:
        points: one for each candidate and length, in the order given.
        recommended: the one to take.
        within_limit: whether its drop is within `max_drop`.
        max_drop: the limit, or None.
        old_weight: weight of the old accuracy in the scores.
        accuracy_before: of the old samples, now.
        new_samples: how many new samples the new accuracy was read from.
        cost: of all forecasts and readings together; passes over the old and the new samples.
        share: cost relative to that of training every candidate, in passes forward and backward of one sample.
    """

    points: tuple[Point, ...]
    recommended: Point
    within_limit: bool
    max_drop: float | None
    old_weight: float
    accuracy_before: float
    new_samples: int
    cost: Cost
    share: float

    @property
    def frontier(self) -> tuple[Point, ...]:
        """The points that no other beats in drop or new accuracy without being beaten in the other."""
        return non_dominated(self.points)

    @property
    def reason(self) -> str:
        """The recommendation in a sentence."""
        return told(self.recommended, self.points, self.max_drop)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each point; `recommended` marks the one to take, `frontier` those that no other beats."""
        kept = {id(point) for point in self.frontier}
        rows = [
            vars(point)
            | {
                "candidate": point.candidate.name,
                "frontier": id(point) in kept,
                "recommended": point is self.recommended,
            }
            for point in self.points
        ]
        return pd.DataFrame(rows)


def advise(
    model: nn.Module,
    old: Any,
    new: Any,
    training: Training,
    *,
    candidates: Sequence[Candidate] | None = None,
    lengths: Sequence[float] = (1.0,),
    parameters: Choice = None,
    modules: Sequence[str] | None = None,
    budget: float = 0.15,
    max_drop: float | None = None,
    old_weight: float | None = None,
    outputs: Outputs = None,
    estimator: Estimator = "auto",
    head: Head = "as_is",
    restraint: Restraint | None = None,
    validation: Any = None,
    new_samples: int = 256,
    answers_now: Bool[Tensor, "_ C"] | None = None,
    answers_then: Bool[Tensor, "_ C"] | None = None,
    answers_new: Bool[Tensor, "_ C"] | None = None,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda _: None,
) -> Advice:
    r"""Say how many parameters to train on a new task, before any of them trains.

    For every candidate a `forecast` of the same training, and for every length alpha a reading of the point

        theta(alpha) = theta_old + alpha (theta_end - theta_old)

    with theta_end the forecast end, the head's rows included: the accuracy of the old samples and that of new ones.
    Taken is the highest

        score = old_weight * old accuracy + (1 - old_weight) * new accuracy

    within `max_drop`, both accuracies smoothed, so that samples near a boundary count as part right
    (`smoothed_accuracy`); see `choose`. Every point is read on a few old samples, and those that these cannot tell
    apart on more (`race`): give many. What is not to be trusted is marked, and takes part. The model is left as it is.

    Args:
        model: as for `forecast`, like all that is not named here.
        old: with labels.
        new: with labels.
        training: of every candidate.
        candidates: sets of parameters; by default nested ones from the end of the model, see `candidates`.
        lengths: shares alpha of the way, in [0, 1].
        parameters: that may train.
        modules: as for `candidates`, of the default ones.
        budget: cost as a share of that of all candidates' trainings, readings of points included. Candidates that
            another contains share its anchors (`forecast_within`).
        max_drop: largest drop of old accuracy that is fine; None for any.
        old_weight: in [0, 1]; by default old labels / (old labels + new labels), so that every class of every side
            counts alike.
        outputs: as for `forecast`.
        estimator: as for `forecast`.
        head: as for `forecast`.
        restraint: as for `forecast`.
        validation: new samples that do not train, with labels, for the new accuracy; by default a draw of `new`, class
            by class in their shares. On what it trains on a large training looks better than it is.
        new_samples: that are read for it, at most; fewer where they would take more than a sixth of the budget.
        answers_now: (n, C) among which outputs the answer to each old sample is chosen now, or (1, C) for all of them;
            None for all outputs. Of chosen `outputs`, in rising order.
        answers_then: the same after the training.
        answers_new: the same for the new samples, or those of `validation`.
        seed: as for `forecast`.
        on_step: called with the number of steps that are done, of `len(candidates) * training.steps`.

    Returns:
        The advice.

    Raises:
        ValueError: what does not fit; no candidate, or an empty one; lengths outside [0, 1]; a budget that does not pay
            for the readings and a forecast.

    Cost: `share` of an exhaustive search at most `budget`, plus one pass over the old samples and `new_samples` new
        ones for the start; with head="placed" one over all new ones. A candidate of the head alone is exact, whatever
        the budget, for one forward pass over the new samples, which head="placed" has made.

    Source: "update magnitude" as a number of parameters, arXiv 2602.20796, Algorithm 1, which chooses by the cosine of
        two gradients; as a length, a closed form for quadratic losses. Here both are chosen by forecast.

    Examples:
        >>> import torch, forgetcast as fc
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        >>> old = torch.randn(40, 8), torch.randint(0, 2, (40,))
        >>> new = torch.randn(60, 8), torch.randint(2, 4, (60,))
        >>> advice = fc.advise(model, old, new, fc.AdamW(learning_rate=1e-3, steps=20, batch_size=16), budget=1)
        >>> [point.candidate.name for point in advice.points], advice.within_limit
        (['head', 'all'], True)
    """
    started = perf_counter()
    require_choice("estimator", estimator, ESTIMATORS)
    require_choice("head", head, ("as_is", "placed"))
    require_number("budget", budget, strict=True)
    require_integer("new_samples", new_samples, least=1)
    require_integer("seed", seed)
    _check_limits(max_drop, old_weight)
    lengths = _lengths(lengths)
    asked = given(model, old, new, training, parameters, outputs, restraint)
    tried = [(each, replace(asked, net=narrowed(asked.net, each))) for each in _tried(asked, candidates, modules)]
    weight = label_share(asked) if old_weight is None else old_weight
    steps = int(getattr(training, "steps", 0))
    run = steps_cost(asked)
    units, reads = 0.0, {"old": 0, "new": 0}
    passes = {"old": 1, "new": int(head == "placed")}
    with asked.net.restored():
        start = read_start(asked, head)
        bench = judge(
            asked,
            start,
            lengths=lengths,
            budget=budget,
            first=_first_old([each for _, each in tried], estimator, budget),
            most=new_samples,
            validation=validation,
            outputs=outputs,
            answers=(answers_now, answers_then, answers_new),
            seed=seed,
        )
        few = bench.old.part(0, bench.first)
        start = replace(start, old=few.features)
        tried = [(candidate, replace(each, old=few.samples)) for candidate, each in tried]
        made: dict[int, list[Entrant]] = {}
        source: NetworkForecast | None = None
        shared = _shared([each for _, each in tried], bench, estimator)
        for done, place in enumerate(shared.order):
            candidate, each = tried[place]
            if source is not None and place in shared.within:
                found = forecast_within(each, start, source)
            else:
                found = forecast_from(
                    each,
                    start,
                    estimator=estimator,
                    budget=shared.budget if place == shared.largest else bench.left(each.net),
                    samples_new=None,
                    seed=seed,
                    on_step=lambda step, done=done * steps: on_step(done + step),  # type: ignore[misc]
                    started=perf_counter(),
                    readings=1,
                    most_rows=ROWS_IN_USE,
                )
            source = found if place == shared.largest else source
            made[place], of_old, of_new = bench.entrants(each.net, candidate, found)
            units += run * found.share_of_run + FORWARD * (of_old + of_new)
            reads = {"old": reads["old"] + of_old, "new": reads["new"] + of_new}
            passes = {side: passes[side] + found.cost.passes.get(side, 0) for side in passes}
            on_step((done + 1) * steps)
        entrants = [entrant for place in range(len(tried)) for entrant in made[place]]
        rules = Rules(bench.accuracy_before, weight, max_drop)
        of_old = race(entrants, bench.old, rules, sum(bench.reserve(each.net) for _, each in tried), run)
        units += FORWARD * of_old
        reads["old"] += of_old
    points = rules.points(entrants)
    best = choose(points, max_drop)
    sizes = {"old": len(asked.old), "new": len(asked.new)}
    passes = {side: passes[side] + round(reads[side] / sizes[side]) for side in passes}
    return Advice(
        tuple(points),
        best,
        max_drop is None or not exceeds(best.drop, max_drop),
        max_drop,
        weight,
        bench.accuracy_before,
        len(bench.new.labels),
        Cost(perf_counter() - started, passes, estimator),
        units / (run * len(tried)) if run else 0.0,
    )


def _first_old(tried: Sequence[Given], estimator: Estimator, budget: float) -> int:
    """Old samples that every point is read on: a few, unless all are to be, or more could not be read later."""
    count = len(tried[0].old)
    whole = budget >= 1 or any(chosen_estimator(estimator, each.net, each.training) == "static" for each in tried)
    return count if whole else min(count, FIRST_OLD)


@dataclass(frozen=True)
class _Shared:
    """Which candidates are forecast from the anchors of another.

    Attributes:
        order: of the candidates, by place; those within another come after it.
        largest: whose anchors serve the others; None where each has its own.
        within: the others.
        budget: of the largest.
    """

    order: tuple[int, ...]
    largest: int | None
    within: frozenset[int]
    budget: float


def _shared(tried: Sequence[Given], bench: Judge, estimator: Estimator) -> _Shared:
    """The anchors of the largest set, for what the sets that it contains would have paid for their own."""
    every = range(len(tried))
    alone = _Shared(tuple(every), None, frozenset(), 0.0)
    largest = max(every, key=lambda place: sum(value.numel() for value in tried[place].net.body.values()))
    asked = tried[largest]
    if bench.budget >= 1 or not bench.run or chosen_estimator(estimator, asked.net, asked.training) != "anchored":
        return alone
    within = frozenset(place for place in every if place != largest and contains(asked.net, tried[place].net))
    left = sum(bench.left(tried[place].net) for place in (largest, *within))
    budget = left - len(within) * reading_cost(len(asked.old)) / bench.run
    order = (largest, *(place for place in every if place != largest))
    return _Shared(order, largest, within, min(budget, MOST_SHARED)) if within else alone


def _tried(
    asked: Given, candidates: Sequence[Candidate] | None, modules: Sequence[str] | None
) -> tuple[Candidate, ...]:
    if candidates is None:
        return nested(asked.net, modules)
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise complaint(f"got candidates {names}", "at least one, each of its own name", "Leave None for nested sets.")
    return tuple(candidates)


def _lengths(lengths: Sequence[float]) -> tuple[float, ...]:
    for length in lengths:
        require_number("lengths", length, most=1.0)
    if not lengths or len(set(lengths)) < len(lengths):
        raise complaint(f"got lengths={tuple(lengths)}", "at least one, none twice", "1 is the whole way.")
    return tuple(float(length) for length in lengths)


def _check_limits(max_drop: float | None, old_weight: float | None) -> None:
    for name, value in (("max_drop", max_drop), ("old_weight", old_weight)):
        if value is not None:
            require_number(name, value, most=1.0)
