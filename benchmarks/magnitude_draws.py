"""The linear model of `forecast/magnitude.py`, simulated: Gaussian features, exact solutions, many draws at once.

Nothing here knows a closed form. Arrays of draws have the draw first: (m, ...) in one block, (draws, ...) in the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLOCK = 2_000_000
"""Numbers in the features of one block: 16 MB."""


@dataclass(frozen=True)
class Sizes:
    """p, p_2, n_1 (none where the start is given), n, sigma."""

    shared: int
    specific: int
    first: int | None
    samples: int
    noise: float

    @property
    def parameters(self) -> int:
        return self.shared + self.specific

    def __str__(self) -> str:
        first = "" if self.first is None else f"n_1={self.first}, "
        return f"p={self.shared}, p_2={self.specific}, {first}n={self.samples}, sigma={self.noise:g}"


def fitted(rows: Array, targets: Array, start: Array) -> Array:
    """The least-squares solution nearest to a start: rows (m, n, p), targets (m, n, k), start (m, p, k)."""
    across, gap = rows.swapaxes(1, 2), targets - rows @ start
    if rows.shape[1] < rows.shape[2]:
        return start + across @ np.linalg.solve(rows @ across, gap)
    return start + np.linalg.solve(across @ rows, across @ gap)


def samples_of(draw: Generator, count: int, samples: int, tasks: Array, noise: float) -> tuple[Array, Array]:
    """Features (count, n, P) and labels (count, n, k) of tasks (P, k), with features and noise in common."""
    rows = draw.standard_normal((count, samples, len(tasks)))
    return rows, rows @ tasks + noise * draw.standard_normal((count, samples, 1))


def refitted(rows: Array, targets: Array, start: Array, shared: int) -> Array:
    """As `fitted`, the first `shared` parameters kept."""
    rest = targets - rows[:, :, :shared] @ start[:, :shared]
    return np.concatenate([start[:, :shared], fitted(rows[:, :, shared:], rest, start[:, shared:])], 1)


def squared(difference: Array) -> Array:
    """Squared norms over the parameters: (m, P, k) to (m, k)."""
    return np.square(difference).sum(1)


def transition(
    draw: Generator, draws: int, sizes: Sizes, first: Array, seconds: Array, start: Array
) -> dict[str, Array]:
    """Task 2 after task 1, of each draw: what task 1 left, forgetting F and error G, (draws, k) each.

    Args:
        draw: source of all randomness.
        draws: how many.
        sizes: n_1 says whether task 1 is learnt, by all parameters, or its end is given.
        first: task 1 (P,).
        seconds: k candidates for task 2 (P, k); each draw has the same features and noise for all of them.
        start: where task 1 starts, or its end (P,).
    """
    p, found = sizes.shared, list[dict[str, Array]]()
    for count in blocks(draws, sizes.parameters * max(sizes.samples, sizes.first or 0)):
        old = np.broadcast_to(start[:, None], (count, sizes.parameters, 1))
        if sizes.first is not None:
            old = fitted(*samples_of(draw, count, sizes.first, first[:, None], sizes.noise), old)
        old = np.broadcast_to(old, (count, *seconds.shape))
        rows, targets = samples_of(draw, count, sizes.samples, seconds, sizes.noise)
        away, ahead = old - first[:, None], old - seconds
        block = {
            "e_u": squared(away[:, :p]),
            "e_q": squared(away[:, p:]),
            "d_u": squared(ahead[:, :p]),
            "d_q": squared(ahead[:, p:]),
        }
        for mode, kept in (("frozen", p), ("initialized", 0)):
            new = refitted(rows, targets, old, kept)
            block[f"{mode} F"] = squared(new - first[:, None]) - squared(away)
            block[f"{mode} G"] = squared(new - seconds)
        found.append(block)
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


def sequence_errors(draw: Generator, draws: int, sizes: Sizes, tasks: Array, start: Array, shared: int) -> Array:
    """Errors of the trained part after task t of task k: (draws, t, k).

    Args:
        draw: source of all randomness.
        draws: how many.
        sizes: n of each task, sigma.
        tasks: T of them (P, T).
        start: (P,).
        shared: so many parameters, the first, are kept.
    """
    found = []
    for count in blocks(draws, sizes.parameters * sizes.samples):
        theta, errors = np.broadcast_to(start[:, None], (count, len(start), 1)), []
        for task in tasks.T:
            rows, targets = samples_of(draw, count, sizes.samples, task[:, None], sizes.noise)
            theta = refitted(rows, targets, theta, shared)
            errors.append(squared((theta - tasks)[:, shared:]))
        found.append(np.stack(errors, 1))
    return np.concatenate(found)


def ways(draw: Generator, draws: int, sizes: Sizes, task: Array) -> Array:
    """From zero to the interpolating solution of a task (P,): (draws, P)."""
    found = []
    for count in blocks(draws, sizes.parameters * sizes.samples):
        rows, targets = samples_of(draw, count, sizes.samples, task[:, None], sizes.noise)
        found.append(fitted(rows, targets, np.zeros((count, sizes.parameters, 1)))[:, :, 0])
    return np.concatenate(found)


def gradients(draw: Generator, draws: int, sizes: Sizes, task: Array, groups: int = 20) -> Array:
    """Of the shared parameters, at zero: means over all samples of the draws of each group, (groups, p)."""
    found = []
    for _ in range(groups):
        parts = []
        for count in blocks(draws // groups, sizes.parameters * sizes.samples):
            rows, targets = samples_of(draw, count, sizes.samples, task[:, None], sizes.noise)
            parts.append(-np.einsum("mnp,mn->mp", rows[:, :, : sizes.shared], targets[:, :, 0]) / sizes.samples)
        found.append(np.concatenate(parts).mean(0))
    return np.stack(found)


def blocks(draws: int, numbers: int) -> Iterator[int]:
    """Draws in each block, of so many numbers a draw."""
    edges = [*range(0, draws, max(1, BLOCK // numbers)), draws]
    return (end - begin for begin, end in pairwise(edges))
