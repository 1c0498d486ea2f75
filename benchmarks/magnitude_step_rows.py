"""Rows of benchmarks/magnitude_simulation.py: step lengths in closed form beside simulations and searches."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from benchmarks.magnitude_draws import Array, Sizes, ways
from benchmarks.magnitude_rows import DRAWS, SEED, Row
from forgetcast.forecast.step_length import Quadratic, expected_step_lengths, step_length

WAYS = ((0.6, 0.9, 0.3), (1.0, 0.4, 0.1), (0.8, -0.5, 0.5))
"""r, c, sigma."""
WEIGHTS = (0.0, 1.0, 4.0)
Loss = Callable[[Tensor], float]


def step_lengths() -> Iterator[Row]:
    """Steps of the least mean error along the way to task 2's solution; steps along quadratics of any shape."""
    P, n = 60, 20
    for number, (ratio, cosine, noise) in enumerate(WAYS):
        draw = np.random.default_rng([SEED, 5, number])
        first, second = 2 * np.eye(P)[:2]
        first, second = ratio * (cosine * second + (1 - cosine**2) ** 0.5 * first), second
        way = ways(draw, DRAWS, Sizes(0, P, None, n, noise), second)
        for weight in WEIGHTS:
            told = expected_step_lengths(ratio, cosine, noise**2 * P / ((P - n - 1) * 4), weight)
            shown = {"both": (told.both, weight, 1.0)}
            if weight == 0:
                shown = {"old": (told.old, 1.0, 0.0), "new": (told.new, 0.0, 1.0)}
            for name, (closed, *weights) in shown.items():
                setting = f"r={ratio:g}, c={cosine:g}, P={P}, n={n}, sigma={noise:g}"
                setting += f", w={weight:g}" if name == "both" else ""
                yield Row(setting, f"alpha, {name}", closed, *least(way, (first, second), weights))
    for number, weight in enumerate(WEIGHTS):
        draw = np.random.default_rng([SEED, 6, number])
        (old, old_loss), (new, new_loss) = bowl(draw), bowl(draw)
        across = torch.from_numpy(draw.standard_normal(30))
        alpha, gain = searched(across, (old_loss, new_loss), weight)
        told_alpha, told_gain = step_length(old, new, across, weight)
        setting = f"two anisotropic quadratics, 30 parameters, w={weight:g}"
        yield Row(setting, "alpha*, by a search", told_alpha, alpha, 0.0)
        yield Row(setting, "loss saved, by a search", told_gain, gain, 0.0)


def searched(way: Tensor, losses: tuple[Loss, Loss], weight: float) -> tuple[float, float]:
    """The best step and what it saves, by Brent's method on the values of the losses."""
    old, new = losses
    found = minimize_scalar(lambda alpha: weight * old(alpha * way) + new(alpha * way))
    return float(found.x), -float(found.fun)


def bowl(draw: np.random.Generator, size: int = 30) -> tuple[Quadratic, Loss]:
    """A quadratic whose curvatures lie between 0.01 and 10, and its value at a step."""
    vectors = torch.linalg.qr(torch.from_numpy(draw.standard_normal((size, size))))[0]
    curvature = vectors @ torch.diag(torch.logspace(-2, 1, size, dtype=torch.float64)) @ vectors.T
    gradient = torch.from_numpy(draw.standard_normal(size))
    return Quadratic(gradient, curvature.mv), lambda step: float(gradient @ step + step @ curvature @ step / 2)


def least(way: Array, tasks: Sequence[Array], weights: Sequence[float]) -> tuple[float, float]:
    """The step alpha with the least weighted mean of |alpha way - task|^2 over all draws; its standard error."""
    toward = way @ (np.stack(tasks, 1) @ np.array(weights))
    length = sum(weights) * np.square(way).sum(1)
    alpha = float(toward.mean() / length.mean())
    return alpha, float((toward - alpha * length).std(ddof=1) / len(way) ** 0.5 / length.mean())
