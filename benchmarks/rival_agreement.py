"""Whether forecasts order methods by what they forget as measurements do: rank correlation, pairs, permutations."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import kendalltau

PERMUTATIONS = 10_000
Table = Mapping[str, Any]
Transition = Mapping[str, tuple[float, float]]
"""Of each row the forecast and the measured drop."""


def transitions_of(forecasts: Mapping[str, Table], *, followed: bool) -> list[Transition]:
    """The transitions of a data set, seed after seed, with the rows that have them all.

    Args:
        forecasts: of each seed, of each run.
        followed: whether rows are left out of whose training a forecast leaves something out.
    """
    found: list[Transition] = []
    for runs in forecasts.values():
        own = [one for one in runs.values() if "transitions" in one and not (followed and one["left_out"])]
        count = max((len(one["transitions"]) for one in own), default=0)
        for index in range(count):
            both = {one["label"]: one["transitions"][index] for one in own}
            found.append({label: (one["forecast"], one["measured"]) for label, one in both.items()})
    return found


def signs(values: Sequence[float]) -> np.ndarray:
    """(n, n): which of two is larger."""
    array = np.asarray(values)
    found: np.ndarray = np.sign(array[:, None] - array[None, :])
    return found


def agreement(transitions: Sequence[Transition]) -> dict[str, Any] | None:
    """Kendall's tau-b over rows at each transition, the share of pairs in the right order, and how likely by chance.

    A pair counts where the measured drops differ; equal forecasts are half right. The permutations exchange the
    forecasts of whole rows, all transitions of all data sets together, since those of one row hang together; p is the
    share of them (with the identity) whose mean tau is as large. Transitions of equal forecasts, or of equal drops, say
    nothing and are left out.

    Args:
        transitions: of which the rows count that all of them have.

    Returns:
        None where nothing is to be ordered.
    """
    labels = sorted(set.intersection(*(set(one) for one in transitions))) if transitions else []
    if len(labels) < 2:
        return None
    columns = [np.array([one[label] for label in labels]).T for one in transitions]
    columns = [both for both in columns if np.ptp(both, axis=1).all()]
    if not columns:
        return None
    taus = [float(kendalltau(*both).statistic) for both in columns]
    pairs = [(signs(seen), signs(real)) for seen, real in columns]
    right = [fmean((0.5 * (1 + seen * real)[real != 0]).tolist()) for seen, real in pairs]
    scales = [float(1 / np.sqrt((seen != 0).sum() * (real != 0).sum())) for seen, real in pairs]
    random = np.random.default_rng(0)
    reached = 1
    for _ in range(PERMUTATIONS):
        order = random.permutation(len(labels))
        exchanged = [(seen[np.ix_(order, order)] * real).sum() for seen, real in pairs]
        reached += (
            fmean(scale * float(one) for scale, one in zip(scales, exchanged, strict=True)) >= fmean(taus) - 1e-12
        )
    return {
        "labels": labels,
        "transitions": len(taus),
        "tau": fmean(taus),
        "right": fmean(right),
        "p": reached / (1 + PERMUTATIONS),
    }
