"""Every spectral filter against simply running the optimiser on one scalar direction."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetcast.forecast import filters

RATE = 0.5
# learning_rate * a on both sides of 1, and a = 0
CURVATURES = torch.tensor([0, 1e-12, 1e-6, 0.01, 0.3, 0.499, 0.5, 0.501, 0.99, 1, 1.01, 1.5, 1.99]).double() / RATE
STEPS = [0, 1, 2, 3, 10, 101]


def run(a, rates, momentum=0.0, nesterov=False):
    """`torch.optim.SGD` on the loss `a z^2 / 2 + z` of every direction."""
    z = torch.zeros_like(a, requires_grad=True)
    optimizer = torch.optim.SGD([z], lr=1.0, momentum=momentum, nesterov=nesterov)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (a * z.square() / 2 + z).sum().backward()
        optimizer.step()
    return -z.detach()


def assert_close(value, truth, tolerance=1e-11):
    torch.testing.assert_close(value, truth, rtol=tolerance, atol=1e-13)


@pytest.mark.parametrize("steps", STEPS)
def test_descent(steps):
    assert_close(filters.gradient_descent(CURVATURES, RATE, steps), run(CURVATURES, [RATE] * steps), 1e-10)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.3, 0.9])
@pytest.mark.parametrize("steps", STEPS)
def test_momentum(steps, momentum, nesterov):
    a = CURVATURES / 2 if nesterov else CURVATURES
    truth = run(a, [RATE] * steps, momentum, nesterov)
    assert_close(filters.momentum_descent(a, RATE, steps, momentum, nesterov), truth, 1e-9)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)])
def test_schedule(momentum, nesterov):
    rates = [RATE * (1 - i / 40) for i in range(30)]
    truth = run(CURVATURES / 2, rates, momentum, nesterov)
    assert_close(filters.scheduled_descent(CURVATURES / 2, rates, momentum, nesterov), truth)


@pytest.mark.parametrize("steps", STEPS)
def test_forms_coincide(steps):
    descent = filters.gradient_descent(CURVATURES, RATE, steps)
    assert_close(filters.scheduled_descent(CURVATURES, [RATE] * steps), descent, 1e-10)
    assert_close(filters.momentum_descent(CURVATURES, RATE, steps, 0.0), descent, 1e-10)
    heavy = filters.momentum_descent(CURVATURES, RATE, steps, 0.7)
    assert_close(filters.scheduled_descent(CURVATURES, [RATE] * steps, 0.7), heavy, 1e-10)


def test_limits_at_zero_curvature():
    zero = torch.zeros(1).double()
    assert filters.gradient_descent(zero, 0.25, 12).item() == 3.0
    assert filters.gradient_flow(zero, 3.0).item() == 3.0
    assert filters.ridge(zero, 4.0).item() == 0.25
    assert filters.ridge(zero, 0.0).item() == 0.0
    z, before = 0.0, 0.0  # z_{i+1} = (1 + beta) z_i - beta z_{i-1} + eta
    for _ in range(12):
        z, before = 1.6 * z - 0.6 * before + 0.25, z
    assert filters.momentum_descent(zero, 0.25, 12, 0.6).item() == pytest.approx(z, rel=1e-13)


def test_no_steps_move_nothing():
    for value in (
        filters.gradient_descent(CURVATURES, RATE, 0),
        filters.momentum_descent(CURVATURES, RATE, 0, 0.9),
        filters.momentum_descent(CURVATURES, RATE, 0, 0.9, True),
        filters.scheduled_descent(CURVATURES, []),
        filters.gradient_flow(CURVATURES, 0.0),
    ):
        assert not value.any()


def test_many_steps_reach_the_pseudo_inverse():
    a = torch.tensor([0.05, 0.5, 1.0, 3.9]).double()
    for value in (
        filters.gradient_descent(a, RATE, 100_000),
        filters.momentum_descent(a, RATE, 100_000, 0.5),
        filters.gradient_flow(a, 1e5),
        filters.ridge(a, 0.0),
    ):
        assert_close(value, 1 / a, 1e-9)


def test_pseudo_inverse_drops_what_torch_drops():
    a = torch.tensor([2.0, 1.0, 1e-17, 0.0]).double()
    assert_close(filters.ridge(a, 0.0), torch.linalg.pinv(torch.diag(a)).diagonal())


def test_flow_is_the_limit_of_small_steps():
    truth = filters.gradient_flow(CURVATURES, 2.0)
    errors = [float((filters.gradient_descent(CURVATURES, 2.0 / n, n) - truth).abs().max()) for n in (10**3, 10**4)]
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.02)


@settings(max_examples=100)
@given(
    share=st.floats(0, 1.999), rate=st.floats(1e-4, 100), steps=st.integers(0, 60), momentum=st.sampled_from([0, 0.9])
)
def test_descent_anywhere(share, rate, steps, momentum):
    a = torch.tensor([share / rate]).double()
    truth = run(a, [rate] * steps, momentum)
    torch.testing.assert_close(filters.momentum_descent(a, rate, steps, momentum), truth, rtol=1e-9, atol=1e-9 * rate)
    if momentum == 0:
        torch.testing.assert_close(filters.gradient_descent(a, rate, steps), truth, rtol=1e-9, atol=1e-11 * rate)
