"""Gradients that are clipped in the real training are clipped in its forecast, and in the loop."""

import pytest
import torch
from torch import nn

import forgetcast as fc
from builders import measured_drift, relative_error, train
from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.registry import create
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import digits


@pytest.mark.parametrize("limit", [0.05, 0.5])
@pytest.mark.parametrize("kind", [fc.SGD, fc.AdamW])
def test_forecast_of_a_clipped_training_is_exact(kind, limit) -> None:
    draw = torch.Generator().manual_seed(3)
    old, new = (torch.randn(60, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 4, (60,), generator=draw)
    head = fc.LinearHead(torch.randn(12, 4, generator=draw, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    order = [torch.randperm(60, generator=draw)[:16].tolist() for _ in range(40)]
    training = kind(learning_rate=0.05, steps=40, order=order, max_gradient_norm=limit)
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(new, labels), head, training)
    after = train(new, labels, head, training, order)
    assert relative_error(forecast.drift, measured_drift(old, head, after)) < 1e-10
    free = fc.forecast_linear(
        fc.Features(old), fc.Features(new, labels), head, kind(learning_rate=0.05, steps=40, order=order)
    )
    assert relative_error(free.drift, forecast.drift) > 1e-3  # the limit is felt


def test_the_loop_clips_over_all_parameters() -> None:
    stream = class_incremental(digits(), 5, seed=0)
    width = stream.source.inputs.shape[1]
    backbone = nn.Sequential(nn.Linear(width, 8), nn.ReLU())
    method = create("sequential", backbone, 8)
    before = {name: value.clone() for name, value in method.model.state_dict().items()}
    task = stream.tasks[0]
    steps = -(-len(task.train) // 64)
    one_task = type(stream)(**{**stream.__dict__, "tasks": stream.tasks[:1]})
    optimization = Optimization("sgd", learning_rate=0.1, epochs=1, batch_size=64, max_gradient_norm=1e-3)
    learn(method, one_task, optimization, seed=0)
    moved = sum(
        (method.model.state_dict()[name] - before[name]).square().sum() for name in before if "head" not in name
    )
    # plain descent moves at most rate x norm a step
    assert 0 < float(moved.sqrt()) <= 0.1 * 1e-3 * steps * (1 + 1e-5)


def test_a_limit_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="max_gradient_norm"):
        fc.AdamW(learning_rate=0.1, steps=1, max_gradient_norm=0.0)
    with pytest.raises(ValueError, match="max_gradient_norm"):
        Optimization(max_gradient_norm=-1.0)
