"""Steps along a direction against grids and simulations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetcast.forecast.step_length import Quadratic, expected_step_lengths, step_length


def quadratic(seed: int, rank: int = 7) -> Quadratic:
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(7, rank, dtype=torch.float64, generator=draw)
    return Quadratic(torch.randn(7, dtype=torch.float64, generator=draw), lambda v: root @ (root.T @ v))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0, 4.0]))
def test_exact_on_quadratics(seed, weight):
    old, new = quadratic(seed), quadratic(seed + 1, rank=3)
    direction = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 2))
    best, gain = step_length(old, new, direction, weight)

    def loss(alpha: float) -> float:
        step = alpha * direction
        parts = ((weight, old), (1.0, new))
        return sum(w * float(one.gradient @ step + step @ one.curvature(step) / 2) for w, one in parts)

    assert loss(best) == pytest.approx(-gain, rel=1e-9, abs=1e-12)
    assert all(loss(best + shift) > loss(best) for shift in (-0.1, -1e-3, 1e-3, 0.1))


@pytest.mark.parametrize(
    ("ratio", "cosine", "sigma", "weight"), [(0.6, 0.9, 0.3, 1.0), (1.0, 0.2, 0.0, 4.0), (0.8, -0.5, 0.5, 0.5)]
)
def test_expected_lengths_are_those_of_simulations(ratio, cosine, sigma, weight):
    """The minimum of the mean error along the way to the interpolating solution, over 4,000 draws."""
    P, n, draws = 30, 10, 4000
    draw = np.random.default_rng(0)
    second = np.zeros(P)
    second[0] = 2.0
    first = np.zeros(P)
    first[0], first[1] = 2 * ratio * cosine, 2 * ratio * (1 - cosine**2) ** 0.5
    rows = draw.normal(size=(draws, n, P))
    targets = rows @ second + sigma * draw.normal(size=(draws, n))
    way = (np.linalg.pinv(rows) @ targets[..., None])[..., 0]
    nu = sigma**2 * P / ((P - n - 1) * 4.0)
    told = expected_step_lengths(ratio, cosine, nu, weight)
    length = np.square(way).sum(1).mean()
    toward = [(way @ task).mean() for task in (first, second)]
    spread = [4 * ((way @ task) / length).std() / draws**0.5 for task in (first, second)]
    assert abs(told.old - toward[0] / length) < spread[0] + 0.02 * abs(told.old)
    assert abs(told.new - toward[1] / length) < spread[1] + 0.02
    both = (weight * toward[0] + toward[1]) / ((weight + 1) * length)
    assert abs(told.both - both) < sum(spread) + 0.02


def test_fitted_tasks_are_averaged():
    for tasks in range(2, 7):
        assert expected_step_lengths(0.0, 0.7, weight=tasks - 1).both == pytest.approx(1 / tasks)


def test_a_curvature_that_rounds_below_zero_is_none():
    old = quadratic(0)
    flat = Quadratic(old.gradient, lambda v: -1e-12 * v)
    direction = torch.ones(7, dtype=torch.float64)
    assert flat.along(direction) == (pytest.approx(float(old.gradient.sum())), 0.0)
    assert step_length(old, flat, direction)[0] == pytest.approx(
        -2 * flat.along(direction)[0] / old.along(direction)[1]
    )


def test_what_has_no_length_is_refused():
    old = quadratic(0)
    with pytest.raises(ValueError, match="neither loss bends"):
        step_length(old, old, torch.zeros(7, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"a direction \(3,\) for a gradient \(7,\)"):
        step_length(old, old, torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="g . d"):
        step_length(old, old, torch.full((7,), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"d\^T H d"):
        step_length(old, Quadratic(old.gradient, lambda v: -v), torch.ones(7, dtype=torch.float64))
    with pytest.raises(ValueError, match="cosine"):
        expected_step_lengths(0.5, 1.5)
