"""What a run has fitted of its own samples: against steps on a sample alone, and against a real run of many epochs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import forgetcast as fc
from builders import DOUBLE
from forgetcast.forecast.network import walker
from forgetcast.forecast.network.halves import Halves
from forgetcast.forecast.network.memory import fitted, visits
from forgetcast.forecast.network.steps import Batching
from forgetcast.forecast.network.surrogate import Objective, Surrogate

SAMPLES, PARAMETERS, WIDTH, OUTPUTS = 6, 11, 5, 4
BATCHING = Batching(8.0, 40)


def near_some_point(
    seed: int, loss: str = "cross_entropy"
) -> tuple[Surrogate, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    training = fc.SGD(0.1, 10, batch_size=8, loss=loss)
    targets = torch.randint(0, OUTPUTS, (SAMPLES,), generator=generator)
    directions, gradients = drawn(SAMPLES, WIDTH), drawn(SAMPLES, PARAMETERS)
    theta = drawn(PARAMETERS)
    near = Surrogate(
        drawn(SAMPLES, WIDTH),
        directions / directions.norm(dim=1, keepdim=True),
        gradients,
        gradients @ theta,
        Objective(training, targets, OUTPUTS),
        torch.full((SAMPLES,), 1 / SAMPLES, dtype=DOUBLE),
        0,
        torch.ones(SAMPLES, dtype=torch.bool),
        torch.arange(SAMPLES),
    )
    return near, theta, drawn(OUTPUTS, WIDTH), drawn(OUTPUTS)


def gains_of_plain_descent() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.ones(PARAMETERS, dtype=DOUBLE),
        torch.ones(OUTPUTS, WIDTH, dtype=DOUBLE),
        torch.ones(OUTPUTS, dtype=DOUBLE),
    )


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 3), st.sampled_from(["cross_entropy", "squared"]))
def test_short_steps_move_the_logits_as_descent_on_the_sample_alone_does(seed, often, loss):
    near, theta, weight, bias = near_some_point(seed, loss)
    gains = gains_of_plain_descent()
    errors = []
    for length in (1e-4, 1e-5):
        shift = fitted(near, near.gradients.square(), theta, weight, bias, gains, often, length)
        expected = torch.zeros_like(shift)
        for i in range(SAMPLES):
            own = [part.clone().requires_grad_() for part in (theta, weight, bias)]
            phi = near.features[i] + near.directions[i] * (near.gradients[i] @ own[0] - near.offsets[i])
            logits = own[1] @ phi + own[2]
            gradient = Objective(near.objective.training, near.objective.targets[i : i + 1], OUTPUTS).error(
                logits.detach()[None]
            )[0]
            logits.backward(gradient)
            moved = [part.detach() - length * part.grad for part in own]
            phi = near.features[i] + near.directions[i] * (near.gradients[i] @ moved[0] - near.offsets[i])
            expected[i] = moved[1] @ phi + moved[2] - logits.detach()
        errors.append(float((shift - expected).norm() / expected.norm()))
    assert errors[0] < 0.05
    assert errors[1] < 0.2 * errors[0] + 1e-9


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3), st.integers(1, 30))
def test_no_length_takes_a_sample_past_its_own_minimum(seed, length, often):
    near, theta, weight, bias = near_some_point(seed)
    before = near.moved(theta) @ weight.T + bias
    after = before + fitted(near, near.gradients.square(), theta, weight, bias, gains_of_plain_descent(), often, length)
    losses = [cross_entropy(logits, near.objective.targets, reduction="none") for logits in (before, after)]
    assert bool((losses[1] < losses[0]).all())
    assert bool(torch.isfinite(after).all())


def test_samples_that_the_path_has_read_are_left_alone():
    near, theta, weight, bias = near_some_point(0)
    read = torch.arange(SAMPLES) < 3
    near = replace(near, unread=~read)
    shift = fitted(near, near.gradients.square(), theta, weight, bias, gains_of_plain_descent(), 2, 0.1)
    assert bool((shift[read] == 0).all())
    assert bool((shift[~read].norm(dim=1) > 0).all())


@pytest.mark.parametrize(("step", "often"), [(0, 0), (4, 0), (5, 1), (9, 1), (10, 2)])
def test_a_sample_is_read_once_an_epoch(step, often):
    training = fc.AdamW(learning_rate=[0.1 * (k + 1) for k in range(20)], steps=20, batch_size=8)
    found, length = visits(training, BATCHING, step)
    assert found == often
    rates = sum(0.1 * (k + 1) for k in range(5 * often))
    assert length == pytest.approx(rates / 40)
    assert visits(replace(training, reduction="sum"), BATCHING, step)[1] == pytest.approx(8 * length)


@pytest.mark.usefixtures("unchecked_types")
def test_a_run_of_some_epochs_is_forecast_better_for_it(monkeypatch):
    """Labels of noise can only be fitted by heart; a forecast that forgets this takes them for hard and moves on.

    All of the motion is believed on both sides: shares of it hide how far a path goes.
    """
    monkeypatch.setattr(Halves, "_share", lambda _: 1.0)
    errors, sizes = torch.zeros(2), torch.zeros(2)
    for seed in range(3):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(100, 200), torch.nn.Tanh(), torch.nn.Linear(200, 6))
        old, new = torch.randn(60, 100), (torch.randn(400, 100), torch.randint(3, 6, (400,)))
        training = fc.AdamW(learning_rate=3e-3, steps=80, batch_size=16, classes=(3, 4, 5), seed=seed)
        run = fc.forecast(model, old, new, training, budget=1.0).drift
        knows = fc.forecast(model, old, new, training, budget=0.6, seed=seed).drift
        with monkeypatch.context() as patch:
            patch.setattr(walker, "visits", lambda *_: (0, 0.0))
            forgets = fc.forecast(model, old, new, training, budget=0.6, seed=seed).drift
        errors += torch.stack([(knows - run).norm(), (forgets - run).norm()])
        sizes += torch.stack([knows.norm(), forgets.norm()])
    assert float(errors[0]) < 0.97 * float(errors[1])
    assert float(sizes[0]) < 0.98 * float(sizes[1])
