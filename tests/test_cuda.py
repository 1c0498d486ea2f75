"""The same forecast on a GPU as on the CPU; skipped where there is none."""

import pytest
import torch

import forgetcast as fc
from builders import features, head, labels, relative_error
from forgetcast.learn.linear import train_linear_head

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

DESCENT = {"learning_rate": 0.05, "steps": 40}
TRAININGS = [
    fc.GradientDescent(**DESCENT),
    fc.GradientDescent(learning_rate=0.4, steps=4000),
    fc.GradientDescent(**DESCENT, momentum=0.9, weight_decay=0.01, classes=(2, 3)),
    fc.GradientFlow(time=3.0),
    fc.Ridge(penalty=0.5, toward="zero"),
    fc.GradientDescent(**DESCENT, loss="cross_entropy"),
    fc.SGD(**DESCENT, batch_size=8, momentum=0.9),
    fc.AdamW(**DESCENT, batch_size=8),
]


def forecast(training, device: str, rows: int, *, streamed: bool = False) -> fc.LinearForecast:
    old = fc.Features(features(50, 12, seed=1).to(device), labels(50, 0, 2).to(device))
    phi, y = features(rows, 12, decay=0.4, seed=2).to(device), labels(rows, 2, 4).to(device)
    new = fc.Features(lambda: iter([(phi[:20], y[:20]), (phi[20:], y[20:])])) if streamed else fc.Features(phi, y)
    start = head(12, 4)
    bias = start.bias.to(device)
    return fc.forecast_linear(old, new, fc.LinearHead(start.weight.to(device), bias), training)


@pytest.mark.parametrize("rows", [60, 8])
@pytest.mark.parametrize("training", TRAININGS, ids=repr)
def test_forecast_equals_that_of_the_cpu(training, rows):
    here, there = forecast(training, "cpu", rows), forecast(training, "cuda", rows)
    assert there.drift.is_cuda
    assert relative_error(there.drift.cpu(), here.drift) < 1e-8
    assert there.accuracy == pytest.approx(here.accuracy)
    assert there.vulnerable_rank().rank == here.vulnerable_rank().rank
    assert there.compare(here.drift + here.logits_before).cosine == pytest.approx(1)
    dial = here.settings["training"]["dial"]
    points = {dial: [1, getattr(training, dial)]}
    assert torch.allclose(there.at(**points).mean_squared_drift, here.at(**points).mean_squared_drift)
    assert torch.equal(there.at(**points).accuracy, here.at(**points).accuracy)


def test_streams_moments_and_sequences():
    training = fc.GradientDescent(**DESCENT)
    assert (
        relative_error(forecast(training, "cuda", 60, streamed=True).drift.cpu(), forecast(training, "cpu", 60).drift)
        < 1e-8
    )
    for device in ("cpu", "cuda"):
        tasks = [
            fc.Features(features(30, 6, seed=s).to(device), labels(30, 2 * s, 2 * s + 2).to(device)) for s in (0, 1)
        ]
        sequence = fc.forecast_sequence(tasks, fc.LinearHead.zeros(6, 4, dtype=torch.float64), training)
        kept = fc.Moments.of(tasks[0], 4)
        moments = fc.forecast_moments(kept, tasks[1], fc.LinearHead.zeros(6, 4, dtype=torch.float64), training)
        if device == "cpu":
            expected = sequence.drift(0), moments.mean_squared_drift
    assert relative_error(sequence.drift(0).cpu(), expected[0]) < 1e-8
    assert moments.mean_squared_drift == pytest.approx(expected[1])


def test_head_trained_on_the_gpu_is_the_one_forecast():
    training = fc.GradientDescent(**DESCENT, loss="cross_entropy")
    start = head(12, 4)
    old, phi, y = features(50, 12, seed=1).cuda(), features(60, 12, seed=2).cuda(), labels(60, 2, 4).cuda()
    predicted = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, training)
    after = train_linear_head(phi, y, start, training)
    assert relative_error(predicted.drift, after.logits(old) - start.logits(old)) < 1e-9


def test_devices_may_differ():
    training = fc.GradientDescent(**DESCENT)
    old, new = (
        fc.Features(features(50, 12, seed=1)),
        fc.Features(features(60, 12, seed=2).cuda(), labels(60, 2, 4).cuda()),
    )
    drift = fc.forecast_linear(old, new, head(12, 4), training).drift
    expected = fc.forecast_linear(old, fc.Features(new.phi.cpu(), new.y.cpu()), head(12, 4), training).drift
    assert relative_error(drift.cpu(), expected) < 1e-8
