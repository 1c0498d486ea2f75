"""A forecast told from a path that has been followed: the old answers read on it, and what it knows of its error."""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

from forgetcast.forecast.network.given import Given
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.plan import Budget
from forgetcast.forecast.network.result import NetworkForecast, Reading, read_at
from forgetcast.forecast.network.sampling import sampling_error
from forgetcast.forecast.network.start import Start, degenerate
from forgetcast.forecast.network.trust import Trust
from forgetcast.forecast.network.walker import Path, Place, batching_of
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
    """Read the old samples at the places of a path, and see how far two halves of it part.

    Args:
        asked: what is forecast.
        start: as read; the model stands there.
        path: of its training.
        plan: what the path has cost.
        settings: that the forecast records.
        estimator: that followed the path.
        started: when, on the clock of `perf_counter`.

    Cost: a pass over the old samples for each place, and two over some of them.
    """
    net, old, new, training = asked.net, asked.old, asked.new, asked.training
    assert isinstance(training, SGD | AdamW | GradientDescent)
    batching = batching_of(training, len(new), fresh=plan.fresh)
    before = start_reading(net, start)
    readings = (before, *(read_at(net, old, step, place) for step, place in sorted(path.places.items())))
    sampling = None
    if path.surrogates and not plan.exact:
        sampling = sampling_error(net, old, training, path, readings, batching)
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
