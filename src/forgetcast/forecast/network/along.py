"""A forecast told from a path that has been followed: the old answers read on it, and what it knows of its error."""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import torch

from forgetcast.forecast.network.given import Given
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.plan import HALF_OLD, Budget
from forgetcast.forecast.network.result import NetworkForecast, Reading, read_at
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.start import Start, degenerate
from forgetcast.forecast.network.steps import Batching
from forgetcast.forecast.network.trust import Trust
from forgetcast.forecast.network.walker import Path, Place, batching_of, follow
from forgetcast.forecast.result import Cost
from forgetcast.forecast.training import SGD, AdamW, GradientDescent


def start_reading(net: Network, start: Start) -> Reading:
    """Of the old samples where the model stands."""
    return Reading(0, Place(net.theta(), net.weight(), net.bias()), start.old)


def along(
    asked: Given,
    start: Start,
    path: Path,
    plan: Budget,
    settings: Mapping[str, Any],
    *,
    estimator: str,
    started: float,
) -> NetworkForecast:
    """Read the old samples at the places of a path, and test it against the path of half of its samples.

    Args:
        asked: what is forecast.
        start: as read; the model stands there.
        path: of its training.
        plan: what the path has cost.
        settings: that the forecast records.
        estimator: that followed the path.
        started: when, on the clock of `perf_counter`.

    Cost: a pass over the old samples for each place, and one over some of them.
    """
    net, old, new, training = asked.net, asked.old, asked.new, asked.training
    assert isinstance(training, SGD | AdamW | GradientDescent)
    batching = batching_of(training, len(new), fresh=plan.fresh)
    before = start_reading(net, start)
    readings = (before, *(read_at(net, old, step, place) for step, place in sorted(path.places.items())))
    sampling = None
    if path.surrogates and not plan.exact and max(len(near) for near in path.surrogates) > 1:
        sampling = _sampling_error(net, old, training, path, readings, batching)
    silent = bool(net.body) and bool(path.surrogates) and not bool(path.surrogates[0].gradients.any())
    blind = sum(path.blind) / max(len(path.blind), 1)
    passes = {"old": len(readings) - 1 + (sampling is not None), "new": round(plan.new_cost / len(new))}
    return NetworkForecast(
        drift=readings[-1].logits - before.logits,
        logits_before=before.logits,
        targets=old.targets,
        settings={
            "training": asked.described,
            **settings,
            "head": start.head,
            "restraint": net.restraint is not None,
        },
        cost=Cost(perf_counter() - started, passes, estimator),
        estimator=estimator,
        trust=Trust(sampling, path.surrogate_error, blind, degenerate(net, new, training), plan.exact, silent),
        share_of_run=plan.share,
        readings=readings,
        batching=batching,
        training=training,
        _net=net,
        _surrogates=path.surrogates,
        _windows=path.windows,
        _shares=path.shares,
        _stock=path.stock,
    )


def _sampling_error(
    net: Network,
    old: Samples,
    training: SGD | AdamW | GradientDescent,
    path: Path,
    readings: Sequence[Reading],
    batching: Batching,
) -> float | None:
    """How far the old drift moves with every other sample of each anchor, and the noise of a run's batches.

    This path is walked whole, whatever share of its motion the forecast believes: the rest of it is what is uncertain.
    """
    halves = [near.part(torch.arange(0, len(near), 2)) for near in path.surrogates]
    step = readings[-1].step
    windows = [2 * count for count in path.windows]  # as many samples in use, so that the optimiser sees as much noise
    noise = torch.Generator().manual_seed(0)
    again = follow(
        net, training, readings[0].place, halves, [step], batching, windows, generator=noise, stock=path.stock
    )
    place = again.places[step]
    few = torch.linspace(0, len(old) - 1, min(len(old), HALF_OLD)).long()
    before = readings[0].logits[few.to(net.device)]
    drift = readings[-1].logits[few.to(net.device)] - before
    size = float(drift.double().norm())
    if size == 0:
        return None
    half = read_at(net, old.at(few), step, place).logits - before
    return float((half - drift).double().norm()) / size
