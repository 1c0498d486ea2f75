"""Mistakes that a reviewer found once: each stays found."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import forgetcast as fc
from builders import features, head, labels, relative_error, train


def tasks(dtype=torch.float64):
    old = fc.Features(features(40, 8, seed=1, dtype=dtype), labels(40, 0, 2))
    new = fc.Features(features(30, 8, seed=2, dtype=dtype), labels(30, 2, 4))
    return old, new


def test_a_head_is_a_copy_of_the_module_it_came_from():
    module = nn.Linear(8, 4, dtype=torch.float64)
    old, new = tasks()
    for start in (fc.LinearHead.from_module(module), fc.LinearHead(module.weight.T, module.bias)):
        forecast = fc.forecast_linear(old, new, start, fc.GradientDescent(0.1, 20))
        before = forecast.head_after.logits(old.phi)
        with torch.no_grad():
            module.weight.add_(1.0)
        assert torch.equal(forecast.head_after.logits(old.phi), before)


def test_shuffled_loaders_are_refused_where_order_matters():
    old, new = tasks()
    loader = DataLoader(TensorDataset(old.phi, old.y), 16, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=True as the old samples; expected the same order"):
        fc.forecast_linear(fc.Features(loader), new, head(8, 4), fc.Ridge(1.0))
    shuffled = fc.Features(DataLoader(TensorDataset(new.phi, new.y), 16, shuffle=True))
    with pytest.raises(ValueError, match="shuffle=True for a replay of minibatches"):
        fc.forecast_linear(old, shuffled, head(8, 4), fc.SGD(0.1, 5))
    truth = fc.forecast_linear(old, new, head(8, 4), fc.GradientDescent(0.1, 20)).drift
    whole = fc.forecast_linear(old, shuffled, head(8, 4), fc.GradientDescent(0.1, 20)).drift
    assert relative_error(whole, truth) <= 1e-12


@pytest.mark.parametrize(
    "training", [fc.Ridge(1e-7), fc.Ridge(0.0), fc.GradientFlow(1e9), fc.GradientDescent(0.5, 10**9)]
)
def test_resolving_float32_noise_warns(training):
    phi = features(400, 40, decay=3.0, seed=5, dtype=torch.float32)
    given = fc.Features(phi), fc.Features(phi, labels(400, 0, 3)), head(40, 3, dtype=torch.float32)
    with pytest.warns(UserWarning, match="rounding noise of products in float32"):
        fc.forecast_linear(*given, training)
    double = fc.Features(phi.double()), fc.Features(phi.double(), labels(400, 0, 3)), given[2]
    fc.forecast_linear(*double, training)  # exact there: no warning, which would be an error


def test_a_trajectory_warns_as_a_forecast_does():
    phi = features(400, 40, decay=3.0, seed=5, dtype=torch.float32)
    given = fc.Features(phi), fc.Features(phi, labels(400, 0, 3)), head(40, 3, dtype=torch.float32)
    forecast = fc.forecast_linear(*given, fc.GradientDescent(0.5, 10))
    with pytest.warns(UserWarning, match="rounding noise"):
        forecast.at(steps=[10**9])


def test_a_strong_penalty_does_not_drown_the_data_in_its_own_scale():
    old, new = tasks(torch.float32)
    start = head(8, 4, dtype=torch.float32)
    penalty = fc.SpectralAnchor.of(old, start, 3).penalty(1e6)
    single = fc.forecast_linear(old, new, start, fc.Ridge(0.1), penalty=penalty)
    double = [fc.Features(part.phi.double(), part.y) for part in (old, new)]
    truth = fc.forecast_linear(*double, start, fc.Ridge(0.1), penalty=penalty)
    assert relative_error(single.drift, truth.drift) <= 1e-3


@pytest.mark.parametrize(
    "training",
    [
        fc.GradientDescent(0.1, 50),
        fc.GradientDescent(0.1, 50, weight_decay=0.1),
        fc.AdamW(0.1, 50),
        fc.Ridge(1.0),
        fc.Ridge(1.0, toward="zero"),
    ],
)
def test_rank_bound_holds(training):
    old, _ = tasks()
    new = fc.Features(features(2, 8, seed=3), torch.tensor([2, 3]))
    forecast = fc.forecast_linear(old, new, head(8, 4), training)
    assert int(torch.linalg.matrix_rank(forecast.drift)) <= forecast.certificate(1).rank_bound <= 4


def test_accuracy_of_real_valued_targets_is_refused():
    old, _ = tasks()
    real = fc.Features(old.phi, torch.zeros(40, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"targets of shape \(40, 1\); expected integer labels"):
        _ = fc.forecast_sequence([real], head(8, 1), fc.Ridge(1.0)).accuracy_matrix
    with pytest.raises(ValueError, match="expected integer labels"):
        fc.best_order([real, real], head(8, 1), fc.Ridge(1.0))
    assert fc.best_order([real, real], head(8, 1), fc.Ridge(1.0), objective="drift").gain >= 0


def test_anchor_and_probe_agree_beyond_the_rank():
    phi = features(40, 12, seed=1)
    phi[:, 4:] = 0
    anchor = fc.SpectralAnchor.of(fc.Features(phi), head(12, 3), 100)
    probe = fc.SpectralProbe.of(fc.Features(phi), head(12, 3), 100)
    other = head(12, 3, seed=9)
    assert anchor.modes == 5
    assert float(probe.loss(other.logits(phi), 1.0)) == pytest.approx(anchor.penalty(1.0).value(other.stacked()))


def test_probabilities_that_sum_to_one_to_rounding_are_replayed():
    old, new = tasks()
    targets = torch.softmax(features(30, 4, seed=8), 1) * (1 + 9e-5)
    training = fc.GradientDescent(0.1, 100, loss="cross_entropy")
    forecast = fc.forecast_linear(old, fc.Features(new.phi, targets), head(8, 4), training)
    after = train(new.phi, targets, head(8, 4), training)
    assert relative_error(forecast.drift, after.logits(old.phi) - head(8, 4).logits(old.phi)) <= 1e-9


def test_numpy_and_torch_scalars_are_numbers(unchecked_types):
    old, new = tasks()
    plain = fc.GradientDescent(0.25, 5, momentum=0.5, classes=(2, 3))
    training = fc.GradientDescent(np.float32(0.25), np.int64(5), momentum=torch.tensor(0.5), classes=np.array([2, 3]))
    assert training == plain
    schedule = fc.GradientDescent(np.full(5, 0.25), 5, momentum=0.5, classes=(2, 3))
    forecasts = [fc.forecast_linear(old, new, head(8, 4), each) for each in (plain, training, schedule)]
    assert relative_error(forecasts[2].drift, forecasts[0].drift) <= 1e-12
    assert forecasts[1].at(steps=np.array([1, 5])).accuracy.shape == (2,)
    assert [json.loads(json.dumps(each.settings))["training"]["steps"] for each in forecasts] == [5, 5, 5]


def test_penalties_are_checked(unchecked_types):
    with pytest.raises(ValueError, match="penalty root.*nan"):
        fc.QuadraticPenalty(torch.full((2, 3), torch.nan), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"root \(2, 3\) and target \(1, 2\); expected"):
        fc.QuadraticPenalty(torch.zeros(2, 3), torch.zeros(1, 2))
    single = fc.QuadraticPenalty(torch.ones(2, 3), torch.zeros(2, 2))
    assert single.value(torch.ones(3, 2)) == pytest.approx(18.0)


def test_empty_trajectories_are_refused():
    old, new = tasks()
    forecast = fc.forecast_linear(old, new, head(8, 4), fc.GradientDescent(0.1, 5))
    with pytest.raises(ValueError, match=r"steps=\[\]; expected at least one value"):
        forecast.at(steps=[])
    with warnings.catch_warnings(), pytest.raises(ValueError, match="k=-1"):
        forecast.sample_modes(-1)
