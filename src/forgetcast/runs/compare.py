"""Recipes side by side: the same metric of two or more of them, paired over seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, Literal

from forgetcast.checks import complaint, require_choice
from forgetcast.metrics.definitions import RUN_DEFINITIONS
from forgetcast.metrics.matrix import METRICS
from forgetcast.runs.bootstrap import CONFIDENCE, RESAMPLES, Interval
from forgetcast.runs.bootstrap import bootstrap_interval as bootstrap_interval
from forgetcast.runs.keys import did_you_mean, flatten

# Equal accuracies that were averaged in another order differ in their last bits; one test sample is far more than this.
TIE = 1e-9

Record = Mapping[str, Any]
Better = Literal["higher", "lower"]

# What is not an accuracy; the names alone do not tell a forgetting from a transfer.
DIRECTIONS: dict[str, Better] = {
    "first_minus_last": "lower",
    "best_minus_last": "lower",
    "best_before_minus_last": "lower",
    "consecutive_drop": "lower",
    "negative_backward_transfer": "lower",
    "libcontinual_forgetting": "lower",
    "libcontinual_backward_transfer": "higher",
    "continuum_forgetting": "lower",
    "average_sample_accuracy": "higher",
    "last_sample_accuracy": "higher",
    "average_anytime_accuracy": "higher",
    "forward_transfer": "higher",
    "expected_calibration_error": "lower",
    "intransigence": "lower",
    "forgetting_rate": "higher",
}


@dataclass(frozen=True)
class Spread:
    """One recipe over its seeds.

    Attributes:
        recipe: what tells it from the others.
        seeds: that it ran.
        mean: of the metric.
        std: sample standard deviation (n - 1), None for one seed.
        stored: numbers that its method keeps after the last task, in the mean; None where a record does not say.
        growth: how many more with each task after the first, in the mean; None where there is one task alone.
    """

    recipe: str
    seeds: tuple[int, ...]
    mean: float
    std: float | None
    stored: float | None = None
    growth: float | None = None


@dataclass(frozen=True)
class Difference:
    """The second recipe minus the first, over the seeds that both ran.

    Attributes:
        first, second: the recipes.
        seeds: the seeds of both.
        unpaired: how many seeds only one of them ran; they do not count here.
        mean, std: of the differences; None without a pair, and std (n - 1) for one.
        interval: percentile bootstrap interval of the mean difference.
        no_interval: why there is none.
        wins, ties, losses: seeds at which the second is better, equal, worse.
    """

    first: str
    second: str
    seeds: tuple[int, ...]
    unpaired: int
    mean: float | None
    std: float | None
    interval: Interval | None
    no_interval: str | None
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Comparison:
    """A metric of some recipes: each one's spread, and the difference of every two."""

    metric: str
    definition: str | None
    better: Better
    confidence: float
    spreads: tuple[Spread, ...]
    differences: tuple[Difference, ...]


def compare(
    records: Sequence[Record],
    metric: str,
    *,
    better: Better | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two or more recipes over their seeds.

    Records belong to one recipe when they differ in seed, checkpoints, trackers and expected values alone.

    Args:
        records: of finished runs; the order in which recipes first appear is kept.
        metric: a key of their `metrics`.
        better: whether higher or lower values are; known for the metrics of `forgetcast.metrics`.
        confidence: of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two recipes, a recipe that ran a seed twice, an unfinished run, a record without the
            metric, a metric of which it is not known whether more is better.
    """
    better = better or _direction(metric)
    require_choice("better", better, ("higher", "lower"))
    groups: dict[str, dict[int, float]] = {}
    recipes: dict[str, dict[str, Any]] = {}
    kept: dict[str, list[Sequence[int]]] = {}
    for record in records:
        recipe = _recipe_of(record)
        identity = json.dumps(recipe, sort_keys=True)
        recipes[identity] = recipe
        values = groups.setdefault(identity, {})
        if record["seed"] in values:
            raise complaint(
                f"two records of the recipe {recipe.get('name')} with seed {record['seed']}",
                "one record for each recipe and seed",
                "Leave one of them out.",
            )
        values[record["seed"]] = _value(record, metric)
        kept.setdefault(identity, []).append(record.get("stored_numbers") or ())
    if len(groups) < 2:
        raise complaint(f"records of {len(groups)} recipes", "at least two recipes", "Add the runs of another recipe.")
    labelled = list(zip(_labels(list(recipes.values())), groups.values(), strict=True))
    return Comparison(
        metric,
        RUN_DEFINITIONS.get(metric),
        better,
        confidence,
        tuple(
            Spread(label, tuple(sorted(values)), fmean(values.values()), _std(list(values.values())), *_memory(stored))
            for (label, values), stored in zip(labelled, kept.values(), strict=True)
        ),
        tuple(
            _difference(first, second, better, confidence, resamples, seed)
            for first, second in combinations(labelled, 2)
        ),
    )


def _difference(
    first: tuple[str, Mapping[int, float]],
    second: tuple[str, Mapping[int, float]],
    better: Better,
    confidence: float,
    resamples: int,
    seed: int,
) -> Difference:
    (first_label, ours), (second_label, theirs) = first, second
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    gaps = [theirs[own] - ours[own] for own in seeds]
    enough = len(gaps) >= 2
    gains = [gap if better == "higher" else -gap for gap in gaps]
    wins, losses = sum(gain > TIE for gain in gains), sum(gain < -TIE for gain in gains)
    return Difference(
        first=first_label,
        second=second_label,
        seeds=seeds,
        unpaired=len(ours.keys() ^ theirs.keys()),
        mean=fmean(gaps) if gaps else None,
        std=_std(gaps),
        interval=bootstrap_interval(gaps, confidence=confidence, resamples=resamples, seed=seed) if enough else None,
        no_interval=None if enough else f"an interval needs at least 2 paired seeds, and there are {len(gaps)}",
        wins=wins,
        ties=len(gains) - wins - losses,
        losses=losses,
    )


def _memory(kept: Sequence[Sequence[int]]) -> tuple[float | None, float | None]:
    """Numbers stored after the last task, and how many a task adds, in the mean over runs; None where not told."""
    if not all(kept):
        return None, None
    grown = [(stored[-1] - stored[0]) / (len(stored) - 1) for stored in kept if len(stored) > 1]
    return fmean(stored[-1] for stored in kept), fmean(grown) if len(grown) == len(kept) else None


def _std(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _direction(metric: str) -> Better:
    if metric.endswith("accuracy") and metric in METRICS:
        return "higher"
    if metric not in DIRECTIONS:
        raise complaint(
            f"of metric={metric!r} it is not known whether more is better",
            "a metric of the accuracy matrix, or better='higher' or 'lower'",
            did_you_mean(metric, [*METRICS, *DIRECTIONS]),
        )
    return DIRECTIONS[metric]


def _recipe_of(record: Record) -> dict[str, Any]:
    recipe, seed = record.get("recipe"), record.get("seed")
    if not isinstance(recipe, Mapping) or not isinstance(seed, int) or record.get("state") != "finished":
        raise complaint(
            f"a record with state {record.get('state')!r}, seed {seed!r} and a recipe {type(recipe).__name__}",
            "the record of a finished run, with recipe and seed",
            "Finish that run, or leave it out.",
        )
    return {key: value for key, value in recipe.items() if key not in ("seed", "checkpoint", "trackers", "expected")}


def _value(record: Record, metric: str) -> float:
    metrics = record.get("metrics")
    known = metrics if isinstance(metrics, Mapping) else {}
    value = known.get(metric)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise complaint(
            f"a record of {record['recipe'].get('name')} with {metric}={value!r}",
            f"a number, under one of its metrics {sorted(known)}",
            did_you_mean(metric, known),
        )
    return float(value)


def _labels(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names; recipes of one name are told apart by the keys in which they differ."""
    labels = []
    for recipe in recipes:
        name = str(recipe.get("name"))
        leaves = flatten(recipe)
        namesakes = [flatten(other) for other in recipes if str(other.get("name")) == name]
        keys = sorted({key for other in namesakes for key in other})
        differing = [key for key in keys if any(other.get(key) != leaves.get(key) for other in namesakes)]
        says = ", ".join(f"{key}={leaves.get(key)}" for key in differing)
        labels.append(f"{name} ({says})" if says else name)
    return labels
