"""Vulnerable modes against dense eigenvectors and brute-force counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import forgetcast as fc
from builders import features, head, labels
from forgetcast.forecast.modes import mode_table, vulnerable_rank
from forgetcast.tangent.linear_head import with_bias
from forgetcast.tangent.spectrum import spectrum_of_gram


def forecast(old_rows=30, width=8, outputs=4, bias=True, seed=0, **options):
    old, new = features(old_rows, width, seed=seed), features(25, width, seed=seed + 1)
    training = fc.GradientDescent(**({"learning_rate": 0.1, "steps": 40} | options))
    task = fc.Features(new, labels(25, 0, outputs, seed))
    return fc.forecast_linear(fc.Features(old), task, head(width, outputs, bias=bias, seed=seed), training)


SHAPES = pytest.mark.parametrize(("old_rows", "bias"), [(30, True), (30, False), (5, True)])


@SHAPES
def test_energies_are_those_of_the_dense_eigenvectors(old_rows, bias):
    result, old = forecast(old_rows, bias=bias), features(old_rows, 8)
    phi = with_bias(old, 8 + bias)
    values, vectors = torch.linalg.eigh(phi @ phi.T)
    values, vectors = values.flip(0), vectors.flip(1)
    count = min(phi.shape)
    modes = result.modes(count)
    torch.testing.assert_close(modes.eigenvalues, values[:count], rtol=1e-9, atol=1e-12)
    truth = (vectors[:, :count].T @ result.drift).square().sum(1)
    torch.testing.assert_close(modes.energy, truth, rtol=1e-7, atol=1e-12)
    assert float(modes.energy.sum()) == pytest.approx(float(result.drift.square().sum()), rel=1e-10)
    assert modes.total_energy == pytest.approx(float(result.drift.square().sum()), rel=1e-10)
    torch.testing.assert_close(modes.share, modes.energy / modes.total_energy)
    torch.testing.assert_close(modes.cumulative, modes.share.cumsum(0))


@SHAPES
def test_sample_modes_are_orthonormal_and_carry_the_patterns(old_rows, bias):
    result = forecast(old_rows, bias=bias)
    units = result.sample_modes(4)
    torch.testing.assert_close(units.T @ units, torch.eye(4).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(units.T @ result.drift, result.modes(4).output_patterns, rtol=1e-9, atol=1e-11)


def test_noise_modes_are_zero_columns():
    old = features(30, 8)
    old[:, 4:] = old[:, :4]
    task = fc.Features(features(25, 8, seed=1), labels(25, 0, 3))
    training = fc.GradientDescent(learning_rate=0.1, steps=5)
    units = fc.forecast_linear(fc.Features(old), task, head(8, 3, bias=False), training).sample_modes(8)
    assert not units[:, 4:].any()
    torch.testing.assert_close(units[:, :4].T @ units[:, :4], torch.eye(4).double(), rtol=0, atol=1e-10)


def fewest(values, share):
    total, running = sum(values), 0.0
    for count, value in enumerate(values, 1):
        running += value
        if running >= share * total * (1 - 1e-12):
            return count
    return len(values)


@pytest.mark.parametrize("order", ["eigenvalue", "energy"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_vulnerable_rank_by_brute_force(order, share, seed):
    result = forecast(seed=seed)
    energy = result.modes(9).energy.tolist()
    entries = sorted(result.modes(9).output_patterns.square().flatten().tolist(), reverse=True)
    rank = result.vulnerable_rank(share, order)
    if share < 1:  # at 1 the last modes are rounding
        assert rank.sample_modes == fewest(sorted(energy, reverse=True) if order == "energy" else energy, share)
        assert rank.minimum_function_modes == fewest(entries, share)
    assert rank.function_modes == 4 * rank.sample_modes
    assert rank.minimum_function_modes <= rank.function_modes
    assert rank.captured >= share - 1e-12
    assert (rank.outputs, rank.energy, rank.order) == (4, share, order)


def test_prescribed_spectrum_and_change():
    old = spectrum_of_gram(torch.diag(torch.tensor([4.0, 1.0, 0.25]).double()), torch.float64)
    change = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 8.0]]).double()  # energies 4, 2, 16
    modes = mode_table(old, change, 3)
    torch.testing.assert_close(modes.energy, torch.tensor([4.0, 2.0, 16.0]).double())
    assert modes.effective_rank == pytest.approx(5.25**2 / (16 + 1 + 1 / 16))
    assert modes.energy_effective_rank == pytest.approx(22**2 / (16 + 4 + 256))
    assert vulnerable_rank(old, change, 0.7, "energy").sample_modes == 1
    assert vulnerable_rank(old, change, 0.7, "eigenvalue").sample_modes == 3
    assert vulnerable_rank(old, change, 0.7).minimum_function_modes == 1


def test_nothing_drifts():
    result = forecast(steps=0)
    modes = result.modes(5)
    assert not result.drift.any()
    assert modes.total_energy == modes.energy_effective_rank == 0
    assert not modes.share.any()
    for order in ("eigenvalue", "energy"):
        rank = result.vulnerable_rank(0.9, order)
        assert (rank.sample_modes, rank.function_modes, rank.minimum_function_modes, rank.captured) == (0, 0, 0, 1.0)


@settings(max_examples=40)
@given(
    rows=st.integers(3, 25),
    width=st.integers(2, 12),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
    where=st.floats(0, 1),
)
def test_certificate(rows, width, bias, seed, where):
    result = forecast(rows, width, bias=bias, seed=seed)
    k = round(where * min(rows, width + bias))
    certificate = result.certificate(k)
    slack = 1e-11 * float(result.drift.square().sum())
    assert certificate.tail <= certificate.projected_bound + slack
    assert certificate.projected_bound <= certificate.total_bound + slack
    left = result.sample_modes(max(k, 1))[:, :k]
    outside = result.drift - left @ (left.T @ result.drift)
    assert certificate.tail == pytest.approx(float(outside.square().sum()), rel=1e-6, abs=slack)
    assert int(torch.linalg.matrix_rank(result.drift)) <= certificate.rank_bound
