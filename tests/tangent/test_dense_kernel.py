"""Ridge and gradient flow against the dense tangent kernel, C-Kronecker factor and all."""

import pytest
import torch
from torch import Tensor

import forgetcast as fc
from builders import features, head, labels, relative_error

OUTPUTS = 3


def task(rows: int, width: int, bias: bool):
    old, phi, y = features(11, width, seed=1), features(rows, width, decay=0.4), labels(rows, 0, OUTPUTS)
    start = head(width, OUTPUTS, bias=bias)
    residual = start.logits(phi) - torch.nn.functional.one_hot(y, OUTPUTS)
    return old, phi, y, start, residual


def kernel(left: Tensor, right: Tensor, bias: bool) -> Tensor:
    """K = G (x) I_C in sample-major order; a bias adds 1 to every entry of G."""
    return torch.kron(left @ right.T + bias, torch.eye(OUTPUTS).double())


SHAPES = pytest.mark.parametrize(
    ("rows", "width", "bias"), [(20, 6, True), (20, 6, False), (5, 9, True), (5, 9, False)]
)


@SHAPES
@pytest.mark.parametrize("penalty", [0.0, 0.01, 3.0])
def test_ridge(rows, width, bias, penalty):
    old, phi, y, start, residual = task(rows, width, bias)
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, fc.Ridge(penalty=penalty))
    inner = kernel(phi, phi, bias) + penalty * torch.eye(rows * OUTPUTS).double()
    inverse = torch.linalg.pinv(inner, hermitian=True, rtol=1e-12)
    truth = -kernel(old, phi, bias) @ inverse @ residual.ravel()
    assert relative_error(forecast.drift, truth.view(-1, OUTPUTS)) <= 1e-9


@SHAPES
def test_ridge_toward_zero_forgets_the_start(rows, width, bias):
    old, phi, y, start, _ = task(rows, width, bias)
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, fc.Ridge(penalty=0.2, toward="zero"))
    target = torch.nn.functional.one_hot(y, OUTPUTS).double()
    inner = phi @ phi.T + bias + 0.2 * torch.eye(rows).double()
    truth = (old @ phi.T + bias) @ torch.linalg.solve(inner, target) - start.logits(old)
    assert relative_error(forecast.drift, truth) <= 1e-10


@SHAPES
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_flow(rows, width, bias, reduction):
    old, phi, y, start, residual = task(rows, width, bias)
    training = fc.GradientFlow(time=1.7, reduction=reduction)
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, training)
    time = 1.7 * (2.0 if reduction == "sum" else 2 / (rows * OUTPUTS))
    values, vectors = torch.linalg.eigh(kernel(phi, phi, bias))
    values = values.clamp_min(0)
    gain = torch.where(values > 1e-12, -torch.expm1(-time * values) / values.clamp_min(1e-300), time)
    truth = -kernel(old, phi, bias) @ vectors @ (gain * (vectors.T @ residual.ravel()))
    assert relative_error(forecast.drift, truth.view(-1, OUTPUTS)) <= 1e-10


def test_converged_decay_is_ridge_toward_zero():
    """Descent with weight decay, run long: `G_on (G_nn + lam I)^-1 Y_new - F_old`, with lam = decay n C / 2."""
    old, phi, y, start, _ = task(20, 6, bias=True)
    options = {"weight_decay": 0.05, "learning_rate": 0.2, "steps": 20_000}
    long = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, fc.GradientDescent(**options))
    ridge = fc.Ridge(penalty=0.05 * 20 * OUTPUTS / 2, toward="zero")
    converged = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, ridge)
    assert relative_error(long.drift, converged.drift) <= 1e-10


def test_converged_drift_penalty_is_ridge_toward_the_start():
    old, phi, y, start, _ = task(5, 9, bias=True)
    options = {"drift_penalty": 0.05, "learning_rate": 0.2, "steps": 20_000}
    long = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, fc.GradientDescent(**options))
    ridge = fc.Ridge(penalty=0.05 * 5 * OUTPUTS / 2)
    converged = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, ridge)
    assert relative_error(long.drift, converged.drift) <= 1e-10
