"""How sure a mean over seeds is: its percentile bootstrap interval."""

from collections.abc import Sequence

import numpy as np

from forgetcast.checks import complaint, require_integer, require_number

RESAMPLES = 10_000
CONFIDENCE = 0.95

Interval = tuple[float, float]


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    r"""Percentile bootstrap interval of a mean.

        [q_{(1 - confidence)/2}, q_{(1 + confidence)/2}] of the means of `resamples` draws with replacement

    With few values it is too narrow: nominal 95% cover about 83% at n = 5 and 93% at n = 20 (normal values).

    Raises:
        ValueError: fewer than two values, a confidence outside (0, 1), no resamples.

    Cost: resamples * n draws, held at once.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    require_number("confidence", confidence, most=0.9999, strict=True)
    require_integer("resamples", resamples, least=1)
    require_integer("seed", seed)
    if len(values) < 2:
        raise complaint(f"{len(values)} values", "at least two", "Run more seeds.")
    draws = np.random.default_rng(seed).choice(np.asarray(values, dtype=np.float64), (resamples, len(values)))
    low, high = np.quantile(draws.mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
