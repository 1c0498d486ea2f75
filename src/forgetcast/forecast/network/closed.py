"""Forecasts of networks in closed form: of a linear head exactly, of a network at the tangent of its start."""

from dataclasses import replace
from time import perf_counter
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.forecast.linear import forecast_linear
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.plan import FORWARD
from forgetcast.forecast.network.result import NetworkForecast, Reading, read_old
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.start import degenerate
from forgetcast.forecast.network.steps import Batching
from forgetcast.forecast.network.trust import Trust
from forgetcast.forecast.network.walker import Place, batching_of
from forgetcast.forecast.result import Cost
from forgetcast.forecast.static import static_drift
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, Training
from forgetcast.tangent.features import Features
from forgetcast.tangent.linear_head import LinearHead


def closed(
    net: Network,
    before: Reading,
    old: Samples,
    new: Samples,
    training: Training,
    described: dict[str, Any],
    estimator: Literal["linear", "static"],
    started: float,
    phi: Float[Tensor, "n d"] | None = None,
) -> NetworkForecast:
    """Forecasts in closed form: of a linear head exactly, of a network at the tangent of its start.

    `phi` are features of the new samples at the start, where they have been read.
    """
    start = before.place
    assert new.targets is not None
    steps = int(getattr(training, "steps", 0))
    if estimator == "linear":
        assert net.head is not None
        head = LinearHead.from_module(net.head)
        read = net.features(new.to(net.device)) if phi is None else phi
        made = forecast_linear(
            Features(before.features, old.targets, name="old"), Features(read, new.targets, name="new"), head, training
        )
        after = made.head_after
        like = start.weight
        weight, bias = torch.as_tensor(after.weight).T.to(like), after.bias
        place = Place(start.theta, weight, start.bias if bias is None else torch.as_tensor(bias).to(like))
        drift, cost = made.drift, made.cost
        if phi is not None:
            cost = replace(cost, passes={**cost.passes, "new": 0})
        trust = Trust(None, None, 0.0, False, exact=True)
        end = Reading(steps, place, before.features)
    else:
        chosen = [*net.body.values(), *net.of_head.values()]
        names = [name for name, parameter in net.model.named_parameters() if any(parameter is p for p in chosen)]
        found = static_drift(
            net.model,
            old.to(net.device).inputs,
            new.to(net.device).inputs,
            new.targets.to(net.device),
            training,
            names,
            outputs=net.read,
        )
        drift = found.drift
        trust = Trust(None, None, 0.0, degenerate(net, new, training))
        cost = replace(found.cost, passes={**found.cost.passes, "old": found.cost.passes["old"] + 1})
        every = dict(net.model.named_parameters())
        with net.restored(), torch.no_grad():
            parts = torch.split(found.delta, [every[name].numel() for name in found.names])
            for name, part in zip(found.names, parts, strict=True):
                every[name].add_(part.view_as(every[name]).to(every[name]))
            end = read_old(net, old, steps, Place(net.theta(), net.weight(), net.bias()))
    batching = Batching(float(len(new)), len(new))
    if isinstance(training, SGD | AdamW | GradientDescent):
        batching = batching_of(training, len(new))
    run = steps * batching.size
    units = len(new) * sum([cost.passes.get("new", 0) * FORWARD])
    return NetworkForecast(
        drift=drift,
        logits_before=before.logits,
        targets=old.targets,
        settings={"training": described, "estimator": estimator},
        cost=Cost(perf_counter() - started, cost.passes, cost.form),
        estimator=estimator,
        trust=trust,
        share_of_run=units / run if run else 0.0,
        readings=(before, end),
        batching=batching,
        training=training,
        _net=net,
        _surrogates=(),
    )
