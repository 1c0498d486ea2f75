"""Optimisers along their expected path: PyTorch's where the samples are the run's own, else the mean of many runs."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from real_run import optimizer_of
from torch import Tensor

import forgetcast as fc
from builders import DOUBLE, relative_error
from forgetcast.forecast.network.steps import Batching, ExpectedStep
from forgetcast.forecast.network.surrogate import Slope

STEPS = 120
RATES = [0.03 * (1 - k / STEPS) for k in range(STEPS)]
TRAININGS = [
    fc.SGD(0.03, STEPS),
    fc.SGD(RATES, STEPS, momentum=0.9, weight_decay=0.1),
    fc.SGD(0.01, STEPS, momentum=0.8, nesterov=True, drift_penalty=0.3, weight_decay=0.05),
    fc.SGD(0.01, STEPS, reduction="sum", momentum=0.5),
    fc.AdamW(0.01, STEPS),
    fc.AdamW(RATES, STEPS, weight_decay=0.3, betas=(0.7, 0.95), epsilon=1e-4),
    fc.AdamW(0.02, STEPS, drift_penalty=0.2, weight_decay=0.1, reduction="sum"),
]


def gradients_at(value: Tensor, step: int, count: int) -> Tensor:
    """Of `count` samples (count, P): some curvature, and noise of the step's own."""
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(count, len(value), generator=generator, dtype=DOUBLE)
    return torch.linspace(0.1, 3, len(value), dtype=DOUBLE) * value + noise


@pytest.mark.parametrize("training", TRAININGS, ids=range(len(TRAININGS)))
def test_is_torchs_optimizer_on_the_runs_own_batches(training):
    start = torch.linspace(-1, 1, 9, dtype=DOUBLE)
    value, own = start.clone(), start.clone().requires_grad_()
    batch = 4
    state, optimizer = (
        ExpectedStep(training, start.clone(), Batching(float(batch), 50, exact=True)),
        optimizer_of(training, [own]),
    )
    for step in range(STEPS):
        slope = _slope(gradients_at(value, step, batch))
        state.step(value, slope, float(batch), float(batch))
        gradients = gradients_at(own.detach(), step, batch)
        own.grad = gradients.mean(0) if training.reduction == "mean" else gradients.sum(0)
        own.grad += training.drift_penalty * (own.detach() - start)
        rates = training.learning_rate
        optimizer.param_groups[0]["lr"] = rates if isinstance(rates, float) else rates[step]
        optimizer.step()
        assert torch.allclose(value, own.detach(), rtol=1e-12, atol=1e-13)
    assert relative_error(value, start) > 0.1


def _slope(gradients: Tensor) -> Slope:
    return Slope(gradients.mean(0), gradients.square().mean(0))


@pytest.mark.parametrize("samples", [2, 7, 30])
def test_expected_square_of_a_minibatch_gradient(samples):
    """Mean over all pairs out of N, and unbiased from any n of them: exactly, by enumeration of a small population."""
    torch.manual_seed(0)
    population, _batch = 30, 2
    gradients = torch.randn(population, 5, dtype=DOUBLE) * torch.logspace(-1, 1, 5, dtype=DOUBLE) + 0.3
    pairs = torch.combinations(torch.arange(population))
    truth = gradients[pairs].mean(1).square().mean(0).sum().item()
    state = ExpectedStep(fc.AdamW(0.1, 1), gradients.new_zeros(5), Batching(2.0, population))
    if samples == population:
        draws = [torch.arange(population)]
    elif samples == 2:
        draws = list(pairs)
    else:
        generator = torch.Generator().manual_seed(1)
        draws = [torch.randperm(population, generator=generator)[:samples] for _ in range(4000)]
    # n = b is taken for the run's own batch, whose square is itself unbiased
    found = [state.expected_square(gradients.new_zeros(5), _slope(gradients[taken]), float(samples)) for taken in draws]
    mean = sum(found) / len(found)
    error = torch.tensor(found).std().item() / len(found) ** 0.5 if samples == 7 else 1e-10 * truth
    assert abs(mean - truth) < 4 * error
    if samples == 7:
        assert error < 0.02 * truth


@pytest.mark.parametrize("rate", [0.003, 0.03])
def test_follows_the_mean_of_many_adam_runs_better_than_adam_on_the_mean_gradient(rate):
    """A quadratic for each sample, `h (w - c_i)`: 150 runs that differ in their sample order."""
    torch.manual_seed(0)
    population, batch, steps, runs, width = 60, 6, 50, 150, 12
    h = torch.linspace(0.2, 2, width, dtype=DOUBLE)
    c = torch.randn(population, width, dtype=DOUBLE) * torch.logspace(-1, 1, width, dtype=DOUBLE)
    c += torch.randn(width, dtype=DOUBLE)
    training = fc.AdamW(rate, steps, batch_size=batch, weight_decay=0.1)
    epochs = -(-steps * batch // population)
    order = torch.stack([torch.cat([torch.randperm(population) for _ in range(epochs)]) for _ in range(runs)])
    own = torch.zeros(runs, width, dtype=DOUBLE, requires_grad=True)  # Adam is elementwise: all runs at once
    optimizer = optimizer_of(training, [own])
    optimizer.param_groups[0]["lr"] = rate
    for step in range(steps):
        taken = order[:, step * batch : (step + 1) * batch]
        own.grad = (h * (own.detach()[:, None] - c[taken])).mean(1)
        optimizer.step()
    mean = own.detach().mean(0)
    standard_error = (own.detach().std(0) / runs**0.5).norm().item()

    def path(samples: float) -> Tensor:
        value = torch.zeros(width, dtype=DOUBLE)
        state = ExpectedStep(training, value.clone(), Batching(float(batch), population))
        for _ in range(steps):
            state.step(value, _slope(h * (value - c)), samples, samples)
        return value

    expected, plain = ((path(float(samples)) - mean).norm().item() for samples in (population, batch))
    assert expected < 3 * standard_error
    assert expected < plain / 10


@pytest.mark.parametrize("training", [fc.SGD(0.1, 1), fc.SGD(0.1, 1, reduction="sum", momentum=0.9)])
def test_plain_descent_follows_the_mean_whatever_the_noise(training):
    gradients = torch.randn(8, 5, dtype=DOUBLE)
    value = torch.zeros(5, dtype=DOUBLE)
    ExpectedStep(training, value.clone(), Batching(3.0, 40)).step(value, _slope(gradients), 8.0, 8.0)
    scale = 3 if training.reduction == "sum" else 1
    assert torch.allclose(value, -0.1 * scale * gradients.mean(0), atol=1e-14)


def test_adam_does_not_step_where_samples_leave_the_direction_open():
    """With few of many samples at hand and a mean within their noise the step is smaller; with all of them not."""
    torch.manual_seed(0)
    gradients = 0.1 + torch.randn(8, 200, dtype=DOUBLE)
    training = fc.AdamW(0.1, 1)

    def stride(population: int) -> float:
        value = torch.zeros(200, dtype=DOUBLE)
        state = ExpectedStep(training, value.clone(), Batching(4.0, population))
        state.step(value, _slope(gradients), 8.0, 8.0)
        return value.norm().item()

    assert stride(10_000) < 0.8 * stride(8)


@pytest.mark.parametrize("population", [1, 2, 7])
def test_variance_of_a_mean_of_samples(population):
    batching = Batching(1.0, population)
    assert batching.noise(population) == 0
    assert batching.noise(1) == (1 if population > 1 else 0)
    values = torch.randn(population, dtype=DOUBLE)
    for samples in range(1, population + 1):
        means = values[torch.tensor(list(combinations(range(population), samples)))].mean(1)
        spread = values.var(correction=0).item()
        assert means.var(correction=0).item() == pytest.approx(spread * batching.noise(samples), abs=1e-12)


def test_a_clipped_step_is_the_step_of_clipped_gradients():
    gradients = torch.randn(4, 5, dtype=DOUBLE)
    for training in (fc.SGD(0.1, 1, momentum=0.9), fc.AdamW(0.1, 1, epsilon=0.1)):
        values = []
        for factor, given in ((0.3, gradients), (1.0, 0.3 * gradients)):
            value = torch.zeros(5, dtype=DOUBLE)
            state = ExpectedStep(replace(training, batch_size=2), value.clone(), Batching(2.0, 20))
            state.step(value, _slope(given), 4.0, 4.0, factor)
            values.append(value)
        assert relative_error(*values) < 1e-12


def test_few_samples_are_taken_for_the_batches_where_that_is_asked_for():
    gradients, training = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=DOUBLE), fc.AdamW(0.1, 1)
    told = []
    for few in (False, True):
        state = ExpectedStep(training, gradients.new_zeros(5), Batching(64.0, 1000, few=few))
        state.step(gradients.new_zeros(5), _slope(gradients), 8.0, 8.0)
        told.append(state.second / (1 - training.betas[1]))
    mean, spread = gradients.mean(0), gradients.var(0, correction=0) / (1 - state.batching.noise(8.0))
    assert torch.allclose(told[1], mean.square())
    assert torch.allclose(told[0], mean.square() + spread * (state.batching.noise(64.0) - state.batching.noise(8.0)))
