"""With an anchor at every step the forecast is the training: against autograd and PyTorch's optimisers."""

from dataclasses import replace

import pytest
import torch
from real_run import body_of, head_of, measured_drift, really_trained
from small_networks import NETWORKS, NEW, network_and_task

import forgetcast as fc
from builders import relative_error
from forgetcast.forecast.network.head import network
from forgetcast.forecast.network.pilot import trained_path
from forgetcast.forecast.network.samples import samples_of
from forgetcast.tangent.jacobian import trainable

STEPS = 8
RATES = [0.02 * (1 - k / STEPS) for k in range(STEPS)]
TRAININGS = {
    "momentum": fc.SGD(0.05, STEPS, batch_size=5, momentum=0.9, weight_decay=0.02, classes=NEW),
    "adam": fc.AdamW(0.01, STEPS, batch_size=5, weight_decay=0.1, classes=NEW, drift_penalty=0.05),
    "adam, squared": fc.AdamW(RATES, STEPS, batch_size=5, weight_decay=0.1, loss="squared", reduction="sum"),
}
MORE = {
    "clipped": replace(TRAININGS["adam"], max_gradient_norm=0.1),
    "nesterov, sum": replace(TRAININGS["momentum"], nesterov=True, reduction="sum", learning_rate=0.01, loss="squared"),
    "full batch": fc.GradientDescent(0.1, STEPS, momentum=0.5, loss="cross_entropy", drift_penalty=0.1),
    "squared full batch": fc.GradientDescent(0.1, STEPS, classes=NEW),
}


def errors(model, old, new, training):
    """Relative errors of the forecast's drift and parameters, and of `trained_path`'s, against a real run."""
    real = really_trained(model, new, training)
    drift, body, head = measured_drift(model, real, old), body_of(real), head_of(real)
    found = fc.forecast(model, old, new, training, estimator="anchored", budget=1)
    assert found.trust.exact
    assert max(found.trust.blind, 0) < 1e-4  # the directions kept are those of the loss
    samples = samples_of("new", new)
    path = trained_path(network(model, samples, trainable(model), None), samples, training, [STEPS])
    moved = float(drift.norm())
    assert moved > 0.05  # something to forecast
    places = found.end, path.places[STEPS]
    return [float((found.drift - drift).norm()) / moved] + [
        error
        for place in places
        for error in (
            relative_error(place.theta - body_of(model), body - body_of(model)),
            relative_error(place.weight, head.weight.detach()),
            relative_error(place.bias, head.bias.detach()),
        )
    ]


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_forecast_is_the_run(name, training):
    model, old, new = network_and_task(name)
    assert max(errors(model, old, new, TRAININGS[training])) < 1e-9


@pytest.mark.parametrize("training", MORE)
def test_the_forecast_is_the_run_for_every_setting(training):
    model, old, new = network_and_task("perceptron")
    assert max(errors(model, old, new, MORE[training])) < 1e-9


@pytest.mark.parametrize("name", NETWORKS)
def test_the_forecast_is_the_run_in_single_precision(name):
    model, old, new = network_and_task(name, dtype=torch.float32)
    assert max(errors(model, old, new, TRAININGS["momentum"])) < 1e-4


def test_a_pilot_of_whole_batches_is_the_run_bit_for_bit():
    model, old, new = network_and_task("perceptron", dtype=torch.float32)
    found = fc.forecast(model, old, new, TRAININGS["adam, squared"], estimator="pilot", budget=1)
    assert found.trust.exact
    real = really_trained(model, new, TRAININGS["adam, squared"])
    assert torch.allclose(found.drift, measured_drift(model, real, old), rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", ["pilot", "anchored"])
@pytest.mark.parametrize("cut", [{}, {"samples_new": 9}])
def test_a_sum_is_a_mean_with_a_smaller_rate(estimator, cut):
    """Also where fewer samples are read than a batch has."""
    model, old, new = network_and_task("perceptron", new=60)
    mean = fc.SGD(0.2, 20, batch_size=20, momentum=0.5)
    total = replace(mean, learning_rate=0.2 / 20, reduction="sum")
    found = [fc.forecast(model, old, new, t, estimator=estimator, budget=0.4, **cut).drift for t in (mean, total)]
    assert relative_error(*found) < 1e-10


def test_dropout_is_off():
    model, old, new = network_and_task("perceptron")
    wet = torch.nn.Sequential(*model[:4], torch.nn.Dropout(0.5), model[4]).train()
    found = [fc.forecast(m, old, new, TRAININGS["adam"], budget=1).drift for m in (model, wet)]
    assert relative_error(*found) < 1e-12
