"""A converged training is solved by Cholesky; everything else by eigenvectors; both give the same weights."""

import pickle

import pytest
import torch

import forgetcast as fc
from builders import DOUBLE, features, head, labels, measured_drift, relative_error, train
from forgetcast.tangent.spectrum import Curvature

CONVERGED = [
    fc.GradientDescent(learning_rate=0.4, steps=4000, reduction="mean"),
    fc.GradientDescent(learning_rate=0.4, steps=4000, weight_decay=0.02),
    fc.GradientDescent(learning_rate=0.4, steps=4000, drift_penalty=0.05, classes=(1, 2, 3)),
    fc.GradientFlow(time=2000.0, weight_decay=0.01),
    fc.Ridge(penalty=0.7),
    fc.Ridge(penalty=0.7, toward="zero"),
    fc.Ridge(penalty=0.0),
]


def case() -> tuple[fc.Features, fc.Features, fc.LinearHead]:
    new = fc.Features(features(90, 12, decay=0.3), labels(90, 1, 4))
    return fc.Features(features(40, 12, seed=5)), new, head(12, 4)


@pytest.mark.parametrize("training", CONVERGED, ids=repr)
def test_solution_equals_the_eigenvectors(training: fc.GradientDescent | fc.GradientFlow | fc.Ridge) -> None:
    old, new, start = case()
    forecast = fc.forecast_linear(old, new, start, training)
    path = forecast._path
    assert path.converged
    assert not path.moments.decomposed
    final = getattr(training, training.dial)
    (solved,) = path.changes([final])
    both = path.changes([final, final])  # two values: through the eigenvectors
    assert relative_error(solved, both[0]) < 1e-12


@pytest.mark.parametrize("training", CONVERGED[:3], ids=repr)
def test_solution_equals_real_training(training: fc.GradientDescent) -> None:
    old, new, start = case()
    drift = fc.forecast_linear(old, new, start, training).drift
    after = train(new.phi, new.y, start, training)
    assert relative_error(drift, measured_drift(old.phi, start, after)) < 1e-9


def test_short_of_convergence_the_eigenvectors_are_taken() -> None:
    old, new, start = case()
    for training in (
        fc.GradientDescent(learning_rate=0.4, steps=30),
        fc.GradientDescent(learning_rate=0.4, steps=0),
        fc.GradientDescent(learning_rate=0.4, steps=4000, momentum=0.5),
        fc.GradientFlow(time=0.0),
    ):
        assert not fc.forecast_linear(old, new, start, training)._path.converged


def test_flat_directions_and_noise_are_not_solved() -> None:
    phi = features(90, 12)
    phi[:, 3] = phi[:, 4]  # one curvature is zero
    flat = fc.Features(phi, labels(90, 0, 4))
    old, _, start = case()
    assert not fc.forecast_linear(old, flat, start, fc.Ridge(penalty=0.0))._path.converged
    noisy = fc.Features(features(90, 12, decay=6).float(), labels(90, 0, 4))  # curvatures below float32 products
    small = fc.LinearHead(start.weight.float(), None)
    with pytest.warns(UserWarning, match="rounding noise"):
        path = fc.forecast_linear(fc.Features(old.phi.float()), noisy, small, fc.Ridge(penalty=1e-9))._path
    assert not path.converged


@pytest.mark.parametrize("rows", [2, 9])
def test_curvature_bounds(rows: int) -> None:
    basis = torch.linalg.qr(torch.randn(rows, rows, dtype=DOUBLE, generator=torch.Generator().manual_seed(rows))).Q
    values = torch.linspace(1, 3, rows, dtype=DOUBLE)
    curvature = Curvature((basis * values) @ basis.T, DOUBLE)
    assert curvature.lies_between(0.99, 3.01)
    assert not curvature.lies_between(1.01, 3.01)
    assert not curvature.lies_between(0.99, 2.99)
    step = torch.randn(rows, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    dual = Curvature(None, DOUBLE, curvature.spectrum)
    assert relative_error(dual @ step, curvature @ step) < 1e-13
    assert relative_error(dual.dense(), curvature.dense()) < 1e-13


@pytest.mark.parametrize(
    "training", [CONVERGED[0], fc.GradientDescent(learning_rate=0.1, steps=5, loss="cross_entropy")], ids=repr
)
def test_forecast_survives_pickling(training: fc.GradientDescent) -> None:
    forecast = fc.forecast_linear(*case(), training)
    again = pickle.loads(pickle.dumps(forecast))
    assert torch.equal(again.drift, forecast.drift)
    assert torch.equal(again.at(steps=[3])[0].drift, forecast.at(steps=[3])[0].drift)
