"""Modes of the drift of a network, and the overlap of old and new tangent spaces, against dense ones."""

import pytest
import torch
from static_networks import CLASSES, network, outputs_of
from torch import nn
from torch.nn.functional import one_hot

import forgetcast as fc
from builders import DOUBLE, dense_jacobian, relative_error
from forgetcast.forecast.network_modes import network_modes
from forgetcast.forecast.static import static_drift
from forgetcast.tangent.jacobian import trainable
from forgetcast.tangent.operator import TangentOperator
from forgetcast.tangent.products import TangentMatrix
from forgetcast.tangent.spectrum import kernel_overlap


def test_network_modes_are_the_dense_ones():
    model, old, new, y = network("reader")
    delta = static_drift(model, old, new, y, fc.GradientFlow(2.0)).delta
    J = dense_jacobian(model, old, trainable(model))[0].flatten(0, 1)
    values, vectors = torch.linalg.eigh(J @ J.T)
    energies = (vectors.T @ (J @ delta)).square().flip(0)
    for tangent in (
        TangentOperator(model, old, trainable(model)),
        TangentMatrix(J.view(6, 4, -1), outputs_of(model, old)),
    ):
        modes = network_modes(tangent, delta, 5)
        assert modes.found.converged
        torch.testing.assert_close(modes.eigenvalues, values.flip(0)[:5], rtol=1e-7, atol=0)
        torch.testing.assert_close(modes.energy, energies[:5], rtol=1e-3, atol=1e-4 * float(energies.sum()))
        assert modes.total_energy == pytest.approx(float(energies.sum()))
        torch.testing.assert_close(modes.energy_of((J @ delta).view(6, 4)), modes.energy)
        bounds = modes.certificate
        assert bounds.tail == pytest.approx(float(energies[5:].sum()), rel=1e-3)
        assert bounds.tail <= bounds.projected_bound <= bounds.total_bound
        outside = delta - J.T @ (vectors[:, -5:] / values[-5:] @ (vectors[:, -5:].T @ (J @ delta)))
        assert bounds.projected_bound == pytest.approx(float(values[-6] * outside.square().sum()), rel=1e-3)
        share = energies.cumsum(0) / energies.sum()
        fewest = int((share < 0.5).sum()) + 1
        assert modes.vulnerable_rank(0.5) == (fewest if fewest <= 5 else None)
    every = network_modes(tangent, delta, 100)
    assert len(every.eigenvalues) == 24
    assert every.vulnerable_rank(1.0) is not None
    assert every.certificate.total_bound == 0.0
    assert network_modes(tangent, delta, 10).found.products > 0
    assert network_modes(tangent, 0 * delta, 3).vulnerable_rank() == 0


def test_unconverged_modes_certify_nothing():
    model, old, new, y = network("reader")
    delta = static_drift(model, old, new, y, fc.GradientFlow(2.0)).delta
    stopped = network_modes(TangentOperator(model, old, trainable(model)), delta, 5, most=6)
    assert not stopped.found.converged
    assert stopped.certificate.total_bound == float("inf")


def test_network_modes_of_a_linear_head_are_those_of_its_features():
    torch.manual_seed(2)
    head = nn.Linear(7, CLASSES).double()
    old, new, y = torch.randn(20, 7, dtype=DOUBLE), torch.randn(12, 7, dtype=DOUBLE), torch.randint(2, CLASSES, (12,))
    training = fc.GradientFlow(3.0)
    linear = fc.forecast_linear(fc.Features(old), fc.Features(new, y), fc.LinearHead.from_module(head), training).modes(
        3
    )
    delta = static_drift(head, old, new, y, training, tolerance=1e-12).delta
    modes = network_modes(TangentOperator(head, old, trainable(head)), delta, 3 * CLASSES, tolerance=1e-8)
    torch.testing.assert_close(modes.eigenvalues, linear.eigenvalues.repeat_interleave(CLASSES), rtol=1e-9, atol=0)
    torch.testing.assert_close(modes.energy.view(3, CLASSES).sum(1), linear.energy, rtol=1e-6, atol=1e-9)


def test_overlap_from_kernel_blocks_is_that_of_the_tangent_spaces():
    model, old, new, y = network("perceptron")
    J_o, J_n = (dense_jacobian(model, x, trainable(model))[0].flatten(0, 1) for x in (old, new[:4]))
    found = kernel_overlap(J_o @ J_o.T, J_o @ J_n.T, J_n @ J_n.T)
    V_o, V_n = (torch.linalg.svd(J, full_matrices=False).Vh for J in (J_o, J_n))
    torch.testing.assert_close(found.cosines, torch.linalg.svdvals(V_o @ V_n.T), rtol=1e-6, atol=1e-6)
    assert found.energy_weighted == pytest.approx(
        float((J_o @ J_n.T).square().sum() / (J_o @ J_o.T).norm() / (J_n @ J_n.T).norm())
    )
    apart = kernel_overlap(torch.eye(3), torch.zeros(3, 2), torch.eye(2))
    assert float(apart.cosines.max()) == apart.mean_square == apart.energy_weighted == 0.0
    same = kernel_overlap(J_o @ J_o.T, J_o @ J_o.T, J_o @ J_o.T)
    torch.testing.assert_close(same.cosines, torch.ones_like(same.cosines))


def test_forgetting_through_the_overlap_is_the_forecast():
    """Doan's form of the ridge forecast: - U_o S_o O S_n (S_n^2 + penalty)^-1 U_n^T r."""
    model, old, new, y = network("perceptron")
    J_o, J_n = (dense_jacobian(model, x, trainable(model))[0].flatten(0, 1) for x in (old, new))
    (U_o, S_o, V_o), (U_n, S_n, V_n) = (torch.linalg.svd(J, full_matrices=False) for J in (J_o, J_n))
    r = (outputs_of(model, new) - one_hot(y, CLASSES)).flatten()
    drift = -(U_o * S_o) @ (V_o @ V_n.T) @ (S_n / (S_n**2 + 0.2) * (U_n.T @ r))
    found = static_drift(model, old, new, y, fc.Ridge(0.2), tolerance=1e-12)
    assert relative_error(found.drift.flatten(), drift) < 1e-9
