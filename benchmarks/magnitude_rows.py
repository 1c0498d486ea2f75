"""Rows of benchmarks/magnitude_simulation.py: every closed form in several settings, beside its simulation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np

from benchmarks.magnitude_draws import Array, Sizes, gradients, sequence_errors, transition
from forgetcast.forecast.magnitude import (
    FirstTask,
    Transition,
    crossing,
    crossing_cosine,
    crossing_of_forgetting,
    frozen,
    initialized,
    optimal_specific,
    sequence,
)

DRAWS, SEED = 20_000, 0

LEARNT = (
    Sizes(40, 60, 30, 25, 0.3),
    Sizes(80, 40, 50, 20, 0.5),
    Sizes(10, 12, 60, 60, 0.4),
    Sizes(120, 10, 80, 100, 0.2),
    Sizes(20, 40, 150, 25, 0.3),
    Sizes(15, 10, 12, 80, 0.6),
    Sizes(0, 30, 20, 15, 0.3),
    Sizes(0, 12, 60, 40, 0.4),
)
GIVEN = (
    Sizes(40, 60, None, 25, 0.3),
    Sizes(30, 50, None, 20, 1.0),
    Sizes(60, 10, None, 50, 0.2),
    Sizes(10, 12, None, 60, 0.4),
)
DISTANCES = (0.2, 1.0)
"""|u_2 - u_1| and |q_2 - q_1|, of tasks with |u_1| = |q_1| = 1."""

OPTIMA = ((20, 1.0, 0.25), (20, 1.0, 0.04), (40, 0.8, 0.2))
NO_OPTIMA = ((20, 0.3, 0.6), (60, 0.3, 0.3))
"""n, xi, eta."""

CROSSINGS = (Sizes(60, 40, 600, 300, 0.3), Sizes(40, 30, 300, 180, 0.5), Sizes(30, 8, 200, 90, 0.2))
CROSSINGS_OF_FORGETTING = (Sizes(15, 5, 60, 200, 0.3), Sizes(10, 40, 500, 64, 0.3))

SEQUENCES = ((Sizes(15, 60, None, 25, 0.3), 6), (Sizes(6, 10, None, 50, 0.3), 6), (Sizes(50, 10, None, 30, 0.2), 5))


@dataclass(frozen=True)
class Row:
    """A closed form beside its simulation."""

    setting: str
    quantity: str
    closed: float
    simulated: float
    standard_error: float

    @classmethod
    def of(cls, setting: object, quantity: str, closed: float, draws: Array) -> "Row":
        """From values of all draws."""
        return cls(str(setting), quantity, closed, float(draws.mean()), float(draws.std(ddof=1) / len(draws) ** 0.5))

    def entry(self, bar: float) -> dict[str, Any]:
        """As kept: `holds` is "bar", or "noise" where it misses the bar within 3 standard errors, or "no"."""
        gap = abs(self.simulated - self.closed)
        relative = gap / abs(self.closed)
        holds = "bar" if relative <= bar else "noise" if gap <= 3 * self.standard_error else "no"
        return {**vars(self), "relative_error": relative, "holds": holds}


def direction(draw: np.random.Generator, *sizes: int) -> Array:
    """A random unit vector for each part, one after another."""
    parts = [draw.standard_normal(size) for size in sizes]
    return np.concatenate([part / np.linalg.norm(part) if len(part) else part for part in parts])


def halves(p: int, vector: Array) -> tuple[float, float]:
    """Squared norms of the shared and the task-specific part."""
    return float(vector[:p] @ vector[:p]), float(vector[p:] @ vector[p:])


def first_task(sizes: Sizes, first: Array, second: Array) -> FirstTask:
    """Task 1 from zero, and how task 2 differs."""
    assert sizes.first is not None
    p, change = sizes.shared, second - first
    turn = float(change[:p] @ first[:p]), float(change[p:] @ first[p:])
    return FirstTask(p, sizes.specific, sizes.first, sizes.noise, *halves(p, first), *halves(p, change), *turn)


def given(sizes: Sizes, first: Array, second: Array, end: Array) -> Transition:
    """The transition from a known end of task 1."""
    p, pairs = sizes.shared, (first - end, first - second, second - end)
    parts = [part for pair in pairs for part in halves(p, pair)]
    return Transition(p, sizes.specific, sizes.samples, sizes.noise, *parts)


def outcomes(task: Transition) -> dict[str, float]:
    """What is expected, by the names of the simulation."""
    start = {"e_u": task.shared_error, "e_q": task.specific_error, "d_u": task.shared_distance}
    found = {**start, "d_q": task.specific_distance}
    for name, outcome in (("frozen", frozen(task)), ("initialized", initialized(task))):
        found |= {f"{name} F": outcome.forgetting, f"{name} G": outcome.error}
    return found


def transitions() -> Iterator[Row]:
    """Forgetting and error of both trainings, and what task 1 leaves where it is learnt."""
    for number, (sizes, distance) in enumerate((sizes, far) for sizes in LEARNT + GIVEN for far in DISTANCES):
        draw = np.random.default_rng([SEED, 1, number])
        parts = sizes.shared, sizes.specific
        first, move, error = (direction(draw, *parts) for _ in range(3))
        second = first + distance * move
        if sizes.first is None:
            start = first + 0.5 * error
            told = outcomes(given(sizes, first, second, start))
        else:
            start = np.zeros(sizes.parameters)
            told = outcomes(first_task(sizes, first, second).then(sizes.samples))
        found = transition(draw, DRAWS, sizes, first, second[:, None], start)
        for name, closed in told.items():
            if closed != 0 and (sizes.first is not None or name[-1] in "FG"):
                yield Row.of(f"{sizes}, distance={distance:g}", name, closed, found[name])


def optimum() -> Iterator[Row]:
    """Forgetting of frozen training at p_2*, at the ends of the plateau and far out; the optimum on integers."""
    for n, gain, loss in OPTIMA + NO_OPTIMA:
        best, setting = optimal_specific(n, gain, loss), f"n={n}, xi={gain:g}, eta={loss:g}"
        grid = np.arange(n + 2, 50 * n)
        values = -n * gain / grid + n * loss / (grid - n - 1)
        if best.specific is None or best.plateau is None:
            falls = (np.diff(values) < 0).mean()
            yield Row(setting, "share of integers from which F falls", 1.0, float(falls), 0.0)
            points = dict.fromkeys((3 * n // 2, 2 * n, 5 * n // 2), "F")
        else:
            yield Row(setting, "p_2*, the best integer", best.specific, float(grid[values.argmin()]), 0.0)
            star, low, high = (round(p2) for p2 in (best.specific, *best.plateau))
            yield Row.of(setting, f"F*, p_2={star}", best.forgetting, frozen_at(star, n, gain, loss)[1])
            points = dict.fromkeys((low, high), "F at an end of the plateau") | {4 * star: "F"}
        for p2, name in points.items():
            yield Row.of(setting, f"{name}, p_2={p2}", *frozen_at(p2, n, gain, loss))


def frozen_at(p2: int, n: int, gain: float, loss: float) -> tuple[float, Array]:
    """F of p_2, closed and simulated, where d_u = sigma^2 = eta / 2, D_q = 0.3 and e_q = xi + D_q, at right angles."""
    shared, change = 5, 0.3
    first, second, start = np.zeros((3, shared + p2))
    start[0], start[shared], second[shared + 1] = sqrt(loss / 2), sqrt(gain + change), sqrt(change)
    sizes = Sizes(shared, p2, None, n, sqrt(loss / 2))
    draw = np.random.default_rng([SEED, 2, n, p2])
    found = transition(draw, DRAWS, sizes, first, second[:, None], start)["frozen F"]
    return frozen(given(sizes, first, second, start)).forgetting, found


def crossings() -> Iterator[Row]:
    """Where the simulated sums of forgetting and error, or the forgettings alone, are equal; the cosine there."""
    for number, sizes in enumerate(CROSSINGS + CROSSINGS_OF_FORGETTING):
        draw, sums = np.random.default_rng([SEED, 3, number]), sizes in CROSSINGS
        size = 4 * sizes.noise**2
        frame = sqrt(size) * np.linalg.qr(draw.standard_normal((sizes.shared, 2)))[0]
        specific, move = (direction(draw, sizes.specific) for _ in range(2))
        first, distances = np.concatenate([frame[:, 0], specific]), 2 * size * np.linspace(0, 1, 6)
        shared = [turned(frame, distance) for distance in distances]
        seconds = np.stack([np.concatenate([part, specific + 0.3 * move]) for part in shared], 1)
        known = first_task(sizes, first, seconds[:, 0]).then(sizes.samples)
        found = transition(draw, DRAWS, sizes, first, seconds, np.zeros(sizes.parameters))
        gap, below = found["frozen F"] - found["initialized F"], True
        if sums:
            closed, gap = crossing(known), gap + found["frozen G"] - found["initialized G"]
        else:
            border = crossing_of_forgetting(known)
            assert border is not None
            below = border[0] == 0
            closed = border[1] if below else border[0]
        at, error = rise(distances, gap if below else -gap)
        what = f"frozen {'is better' if sums else 'forgets less'} {'below' if below else 'above'} D_u ="
        yield Row(str(sizes), what, closed, at, error)
        sampled = replace(sizes, samples=50)
        pair = first, np.concatenate([turned(frame, at), specific])
        cosine, spread = cosine_of(*(gradients(draw, DRAWS, sampled, task) for task in pair))
        spread = float(np.hypot(spread, error / (2 * size)))
        yield Row(str(sizes), "cosine of gradients there", crossing_cosine(closed, size), cosine, spread)


def turned(frame: Array, distance: float) -> Array:
    """The first of two vectors of one norm, at a right angle, turned towards the second by a (squared) distance."""
    cosine = 1 - distance / (2 * float(frame[:, 0] @ frame[:, 0]))
    return cosine * frame[:, 0] + sqrt(max(1 - cosine**2, 0.0)) * frame[:, 1]


def cosine_of(one: Array, other: Array) -> tuple[float, float]:
    """Cosine of the means of two groups of gradients (groups, p), and its standard error by the jackknife."""

    def cosine(first: Array, second: Array) -> Array:
        return (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)

    count = len(one)
    without = cosine(*((part.sum(0) - part) / (count - 1) for part in (one, other)))
    return float(cosine(one.mean(0), other.mean(0))), float(without.std() * (count - 1) ** 0.5)


def rise(distances: Array, gap: Array) -> tuple[float, float]:
    """Where the mean of gap (draws, k) rises through zero, on a line between two distances; its standard error."""
    mean = gap.mean(0)
    i = int(np.flatnonzero((mean[:-1] < 0) & (mean[1:] > 0))[0])
    share = mean[i] / (mean[i] - mean[i + 1])
    there = (1 - share) * gap[:, i] + share * gap[:, i + 1]
    width = distances[i + 1] - distances[i]
    error = there.std(ddof=1) / len(gap) ** 0.5 * width / (mean[i + 1] - mean[i])
    return float(distances[i] + share * width), float(error)


def sequences() -> Iterator[Row]:
    """Average forgetting of a sequence, and the mean error over its tasks at the end."""
    for number, (sizes, count) in enumerate(SEQUENCES):
        draw = np.random.default_rng([SEED, 4, number])
        tasks = np.stack([direction(draw, sizes.shared, sizes.specific) for _ in range(count)], 1)
        for mode, shared in (("frozen", sizes.shared), ("initialized", 0)):
            start = np.zeros(sizes.parameters)
            start[:shared] = tasks[:shared].mean(1)
            trained, away = tasks[shared:], tasks[:shared] - start[:shared, None]
            told = sequence(
                len(trained),
                sizes.samples,
                (np.square(away).sum(0) + sizes.noise**2).tolist(),
                np.square(trained[:, :, None] - trained[:, None]).sum(0).tolist(),
                np.square(trained).sum(0).tolist(),
            )
            errors = sequence_errors(draw, DRAWS, sizes, tasks, start, shared)
            lost = errors[:, -1, :-1] - np.diagonal(errors, axis1=1, axis2=2)[:, :-1]
            setting = f"{sizes}, T={count}"
            yield Row.of(setting, f"{mode}: average forgetting", told.forgetting, lost.mean(1))
            yield Row.of(
                setting, f"{mode}: mean error at the end", float(np.mean(told.errors[-1])), errors[:, -1].mean(1)
            )
