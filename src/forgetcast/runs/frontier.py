"""How far a task may be trained before the forecast drop passes a limit, and what that buys of the new task."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from forgetcast.forecast.linear import forecast_linear
from forgetcast.forecast.network.choice import exceeds
from forgetcast.forecast.network.result import NetworkForecast
from forgetcast.forecast.result import share_right
from forgetcast.modes import evaluating
from forgetcast.runs.upcoming import Upcoming, answers
from forgetcast.tangent.features import Features
from forgetcast.tangent.linear_head import LinearHead

POINTS = 24
BLOCK = 256


@dataclass(frozen=True)
class Point:
    """A shorter training of the same task, a prefix of the whole.

    Attributes:
        steps: of the optimiser; 0 leaves the model as it is, without the new outputs.
        old_accuracy: forecast accuracy of the old samples.
        drop: accuracy now - `old_accuracy`.
        new_accuracy: forecast accuracy of the new training samples, among the outputs that the loss sees; None where
            the forecast does not read them.
    """

    steps: int
    old_accuracy: float
    drop: float
    new_accuracy: float | None


def frontier(forecast: NetworkForecast, task: Upcoming, now: float) -> list[Point]:
    """Points from no step to all steps.

    Geometrically spaced where these cost no pass (a head on frozen features; surrogates); otherwise those at which the
    old samples were read.

    Args:
        forecast: of the task.
        task: what was forecast.
        now: accuracy of the old samples now.
    """
    found: list[tuple[int, float, float | None]]
    if forecast.estimator == "linear":
        found = list(_of_a_head(forecast, task))
    elif not forecast.trust.exact and bool(task.answers_then.all()):
        table = forecast.safe().table
        found = list(table[["steps", "old_accuracy", "new_accuracy"]].itertuples(index=False, name=None))
    else:
        found = [
            (reading.step, share_right(answers(reading.logits, task.answers_then), forecast.labels), None)
            for reading in forecast.readings
        ]
    points = [Point(0, now, 0.0, None)]
    for steps, old, new in found:
        if steps > 0:
            points.append(Point(int(steps), float(old), now - float(old), None if new is None else float(new)))
    return points


def within(points: list[Point], max_drop: float) -> Point:
    """The last point up to which no drop is above the limit."""
    best = points[0]
    for point in points[1:]:
        if exceeds(point.drop, max_drop):
            break
        best = point
    return best


def _of_a_head(forecast: NetworkForecast, task: Upcoming) -> Iterator[tuple[int, float, float | None]]:
    """Steps, old and new accuracy of a head on frozen features. Cost: a pass of new samples, and two simulations."""
    assert isinstance(task.model, nn.Sequential)
    backbone, layer = task.model
    assert isinstance(layer, nn.Linear)
    inputs, labels = task.new
    with torch.no_grad(), evaluating(task.model):
        phi = torch.cat([backbone(part.to(layer.weight.device)) for part in torch.split(inputs, BLOCK)])
    head, training = LinearHead.from_module(layer), task.training
    old = Features(forecast.readings[0].features, forecast.labels)
    steps = sorted({round(training.steps ** (k / POINTS)) for k in range(POINTS + 1)})
    path = forecast_linear(old, Features(phi, labels.to(phi.device)), head, training).at(steps=steps)
    seen = torch.zeros(1, head.outputs, dtype=torch.bool)
    seen[0, list(training.classes or range(head.outputs))] = True
    for place, step in enumerate(steps):
        at = path[place]
        new = answers(at.head_after.logits(phi), seen)
        kept = share_right(answers(at.logits, task.answers_then), forecast.labels)
        yield step, kept, share_right(new, labels.to(new.device))
