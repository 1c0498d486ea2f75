r"""Spectral filters: what a training does along one eigen-direction of a quadratic loss.

A training that is linear in the gradient moves the weights from their start by `-V phi(a) V^T g`, with g the gradient
at the start and a the curvatures (eigenvalues of the Hessian). Each filter below is `phi`; its limit at a = 0 is
included. Source: table of spectral filters in the closed-form theory of arXiv 2606.18024 (ridge), the others derived.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Curvatures = Float[Tensor, " k"]


def ridge(a: Curvatures, penalty: float) -> Curvatures:
    """Converged with a quadratic drift penalty: `1 / (a + penalty)`; without one, the pseudo-inverse.

    Without a penalty, curvatures below `eps * k * max(a)` count as zero (as in `torch.linalg.pinv`).
    """
    if penalty > 0:
        return 1 / (a + penalty)
    cut = torch.finfo(a.dtype).eps * len(a) * a.max()
    return torch.where(a > cut, 1 / a.clamp_min(cut), 0.0)


def gradient_flow(a: Curvatures, time: float) -> Curvatures:
    """Gradient flow for a time: `(1 - exp(-time a)) / a`, limit `time`."""
    return torch.where(a > 0, -torch.expm1(-time * a) / a.clamp_min(torch.finfo(a.dtype).tiny), time)


def gradient_descent(a: Curvatures, learning_rate: float, steps: int) -> Curvatures:
    """Gradient descent: `(1 - (1 - learning_rate a)^steps) / a`, limit `learning_rate steps`.

    Below `learning_rate a = 1` through expm1 and log1p, which do not cancel; above, the power itself (log1p is NaN).
    """
    scaled = learning_rate * a
    small = -torch.expm1(steps * torch.log1p(-scaled.clamp_max(0.5)))
    gain = torch.where(scaled < 0.5, small, 1 - (1 - scaled) ** steps)
    return torch.where(a > 0, gain / a.clamp_min(torch.finfo(a.dtype).tiny), learning_rate * steps)


def momentum_descent(
    a: Curvatures, learning_rate: float, steps: int, momentum: float, nesterov: bool = False
) -> Curvatures:
    """Heavy ball as `torch.optim.SGD(momentum=...)` runs it (Nesterov's form too), by powers of a 3 x 3 affine map.

    The state of one direction is (z, buffer, 1) with gradient `a z + 1`; phi = -z. Cost: O(k log steps).
    """
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    buffer = [a, momentum * one, one]
    move = [a * (1 + momentum), momentum**2 * one, (1 + momentum) * one] if nesterov else buffer
    position = [one - learning_rate * move[0], -learning_rate * move[1], -learning_rate * move[2]]
    rows = [position, buffer, [zero, zero, one]]
    affine = torch.stack([torch.stack(row, -1) for row in rows], -2)
    state: Tensor = torch.linalg.matrix_power(affine, steps)
    return -state[:, 0, 2]


def scheduled_descent(
    a: Curvatures, learning_rates: Sequence[float], momentum: float = 0.0, nesterov: bool = False
) -> Curvatures:
    """Descent with a schedule: the optimiser run on the scalar gradient `a z + 1` from z = 0. Cost: O(k steps)."""
    z, buffer = torch.zeros_like(a), torch.zeros_like(a)
    for rate in learning_rates:
        gradient = a * z + 1
        buffer = momentum * buffer + gradient
        z = z - rate * (gradient + momentum * buffer if nesterov else buffer)
    return -z
