"""How many anchors are in use together, and the noise of a run's batches."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_memory_of_a_run import near_some_point

from forgetcast.forecast.network.window import STALENESS, anchors_in_use, profile, window


@given(st.floats(0, 1e6), st.floats(0, 2), st.floats(1, 64), st.integers(1, 4), st.integers(1, 9))
def test_the_number_of_anchors_is_the_best_one(noise, staleness, samples, least, most):
    """Noise falls and staleness rises with k: no whole number beside the chosen one is better by more than rounding."""
    chosen = anchors_in_use(noise, staleness, samples, least, most)

    def error(k: float) -> float:
        return noise / (samples * k) + (STALENESS * max(staleness, 1e-6) * k) ** 2

    assert least <= chosen <= max(least, most)
    for other in range(least, most + 1):
        if abs(other - chosen) > 2:  # the number is rounded down
            assert error(chosen) <= error(other) + 1e-9


def test_a_window_keeps_the_last_anchors_and_their_shifts():
    anchors = [near_some_point(seed)[0] for seed in range(4)]
    shifts = [torch.full((len(near), 4), float(k), dtype=torch.float64) for k, near in enumerate(anchors)]
    now = window(anchors[0], shifts[0])
    for near, shift in zip(anchors[1:], shifts[1:], strict=True):
        now = now.then(near, shift, 2)
    assert now.parts == (anchors[2], anchors[3])
    assert now.shift is not None
    assert now.shift[:, 0].tolist() == [2.0] * 6 + [3.0] * 6
    assert float(now.weights.sum()) == pytest.approx(1)


@given(st.integers(0, 10_000))
def test_profiles_and_energies_give_the_mean_square_of_gradients(seed):
    """Of one anchor exactly; it is spread over all samples alike where none of them pulls."""
    near, theta, weight, bias = near_some_point(seed)
    held = window(near, None)
    along = held.pulls(held.moved(theta), weight, bias)[2]
    found = profile(near.weights, along, near.gradients.square())
    second = held.body(held.moved(theta), weight, bias, found)[0].second
    expected = (near.weights[:, None] * (along[:, None] * near.gradients).square()).sum(0)
    assert torch.allclose(second, expected)
    nothing = profile(near.weights, torch.zeros_like(along), near.gradients.square())
    assert torch.allclose(nothing, near.weights @ near.gradients.square())


@given(st.integers(0, 10_000))
def test_samples_of_equal_gradients_and_weights_count_fully(seed):
    near, theta, weight, bias = near_some_point(seed)
    held = window(near, None)
    along = held.pulls(held.moved(theta), weight, bias)[2]
    even = replace(near, gradients=near.gradients / (along * near.gradients.norm(dim=1))[:, None])
    even = window(replace(even, offsets=even.gradients @ theta), None)
    assert even.body(near.moved(theta), weight, bias, None)[2] == pytest.approx(len(near.weights))


@pytest.mark.usefixtures("unchecked_types")
def test_how_many_samples_a_mean_is_worth_is_told_by_its_variance():
    """Drawn by the size of their gradients, over many draws: E||mean||^2 - (1 - 1 / m) ||truth||^2 = E sum w^2 e."""
    near, theta, weight, bias = near_some_point(5)
    held = window(near, None)
    features = held.moved(theta)
    gradients = held.pulls(features, weight, bias)[2][:, None] * near.gradients
    energies, truth, drawn = gradients.square().sum(1), gradients.mean(0), 4
    chance = energies.sqrt() / energies.sqrt().sum()
    generator = torch.Generator().manual_seed(0)
    squares, told, even = [], [], []
    for _ in range(3000):
        taken = torch.multinomial(chance, drawn, replacement=True, generator=generator)
        weights = 1 / (len(energies) * chance[taken] * drawn)
        part = window(replace(near.part(taken), weights=weights), None)
        part = replace(part, weights=weights)
        slope, _, sharp = part.body(features[taken], weight, bias, None)
        squares.append(float(slope.mean.square().sum()))
        told.append(float((weights * energies[taken]).sum()) / sharp)
        even.append(float((weights * energies[taken]).sum()) / part.effective)
    variance = sum(squares) / len(squares) - (1 - 1 / drawn) * float(truth.square().sum())
    assert sum(told) / len(told) == pytest.approx(variance, rel=0.05)
    assert sum(even) / len(even) > 1.2 * variance
