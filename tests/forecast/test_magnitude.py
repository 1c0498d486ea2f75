"""Closed forms of update magnitude against simulations of the linear model, and against each other."""

import doctest
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

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

DRAWS = 1500


def fitted(rows, targets, start):
    """Least squares nearest to a start, for many draws at once: rows (m, n, p), targets (m, n), start (m, p)."""
    gap = targets - (rows @ start[..., None])[..., 0]
    return start + (np.linalg.pinv(rows) @ gap[..., None])[..., 0]


def vectors(p, p2, seed, change):
    """u_1, q_1 of about unit length, and u_2, q_2 at a distance."""
    draw = np.random.default_rng(seed)
    first = draw.normal(size=p + p2) / np.sqrt(p + p2)
    second = first + change * draw.normal(size=p + p2) / np.sqrt(p + p2)
    return first, second


def simulated(p, p2, n1, n2, sigma, first, second, seed=0, draws=DRAWS):
    """Forgetting and error of frozen and initialized training, and of task 1's start: draws of each."""
    draw = np.random.default_rng(seed)
    P = p + p2
    rows = draw.normal(size=(draws, n1, P))
    start = fitted(rows, rows @ first + sigma * draw.normal(size=(draws, n1)), np.zeros((draws, P)))
    rows = draw.normal(size=(draws, n2, P))
    targets = rows @ second + sigma * draw.normal(size=(draws, n2))
    whole = fitted(rows, targets, start)
    part = start.copy()
    part[:, p:] = fitted(rows[:, :, p:], targets - (rows[:, :, :p] @ start[:, :p, None])[..., 0], start[:, p:])
    before = np.square(start - first).sum(1)
    found = {}
    for name, theta in (("frozen", part), ("initialized", whole)):
        found[name, "forgetting"] = np.square(theta - first).sum(1) - before
        found[name, "error"] = np.square(theta - second).sum(1)
    found["start", "error"] = before
    return found


def first_task(p, p2, n1, sigma, first, second) -> FirstTask:
    change = second - first
    return FirstTask(
        p,
        p2,
        n1,
        sigma,
        float(first[:p] @ first[:p]),
        float(first[p:] @ first[p:]),
        float(change[:p] @ change[:p]),
        float(change[p:] @ change[p:]),
        float(change[:p] @ first[:p]),
        float(change[p:] @ first[p:]),
    )


SETTINGS = [(8, 12, 6, 5, 0.3), (16, 20, 10, 4, 0.5), (3, 4, 20, 20, 0.4), (12, 4, 8, 12, 0.2), (6, 10, 30, 6, 0.3)]


@pytest.mark.parametrize(("sizes", "change"), list(product(SETTINGS, (0.3, 1.0))))
def test_expected_outcomes_are_those_of_simulations(sizes, change):
    """Within four standard errors of each mean, from task 1's start at zero."""
    p, p2, n1, n2, sigma = sizes
    first, second = vectors(p, p2, 1, change)
    found = simulated(*sizes, first, second)
    task = first_task(p, p2, n1, sigma, first, second).then(n2)
    outcomes = {"frozen": frozen(task), "initialized": initialized(task)}
    for (mode, what), draws in found.items():
        if mode == "start":
            expected = task.shared_error + task.specific_error
        elif what == "forgetting":
            expected = outcomes[mode].forgetting
        else:
            expected = outcomes[mode].error
        assert abs(draws.mean() - expected) < 4 * draws.std() / np.sqrt(len(draws)), (mode, what)


def test_sequences_are_those_of_simulations():
    """Five tasks, frozen and initialized, more parameters than samples and fewer."""
    draw = np.random.default_rng(3)
    for p, p2, n, sigma in ((5, 20, 8, 0.3), (2, 6, 24, 0.3)):
        tasks = draw.normal(size=(5, p + p2)) / np.sqrt(p + p2)
        for shared in (p, 0):
            theta = np.zeros((DRAWS, p + p2))
            theta[:, :shared] = tasks[0, :shared]
            changes = np.square(tasks[:, None, shared:] - tasks[None, :, shared:]).sum(2)
            noises = np.square(tasks[:, :shared] - tasks[0, :shared]).sum(1) + sigma**2
            start = np.square(tasks[:, shared:]).sum(1)
            told = sequence(p + p2 - shared, n, noises.tolist(), changes.tolist(), start.tolist())
            for t, task in enumerate(tasks):
                rows = draw.normal(size=(DRAWS, n, p + p2))
                targets = rows @ task + sigma * draw.normal(size=(DRAWS, n))
                rest = targets - (rows[:, :, :shared] @ theta[:, :shared, None])[..., 0]
                theta[:, shared:] = fitted(rows[:, :, shared:], rest, theta[:, shared:])
                errors = np.square(tasks[:, None, shared:] - theta[None, :, shared:]).sum(2)
                spread = 4 * errors.std(1) / np.sqrt(DRAWS)
                assert (np.abs(errors.mean(1) - np.array(told.errors[t + 1])) < spread).all()
            last = np.array(told.errors[-1])
            own = np.array([told.errors[k + 1][k] for k in range(5)])
            assert told.forgetting == pytest.approx((last - own)[:-1].mean())


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.floats(0.01, 2), st.floats(0.0, 2))
def test_the_optimal_part_is_that_of_a_grid(samples, gain, loss):
    found = optimal_specific(samples, gain, loss)

    def forgetting(p2):
        return -samples * gain / p2 + samples * loss / (p2 - samples - 1)

    grid = samples + 1 + np.geomspace(1e-3, 1e6, 20_000)
    values = forgetting(grid)
    if gain <= loss:
        assert found.specific is None
        assert values.min() >= min(0.0, values[-1])
        assert (np.diff(values) <= 1e-12).all()
        return
    assert found.specific is not None
    assert found.forgetting <= values.min() + 1e-9
    if found.specific < 1e5 and loss > 1e-6:
        assert found.forgetting == pytest.approx(values.min(), rel=1e-2, abs=1e-9)
        assert forgetting(found.specific) == pytest.approx(found.forgetting, rel=1e-6, abs=1e-12)
        assert forgetting(np.array(found.plateau)) == pytest.approx(0.9 * found.forgetting, rel=1e-5, abs=1e-12)
        assert found.plateau[0] < found.specific < found.plateau[1]


def test_published_digits_of_the_optimum():
    for gain, loss, specific, forgetting in (
        (1, 0.25, 42.0, -0.2381),
        (1, 0.04, 26.25, -0.6095),
        (0.5, 0.3, 93.17, -0.0242),
    ):
        found = optimal_specific(20, gain, loss)
        assert found.specific == pytest.approx(specific, abs=0.01)
        assert found.forgetting == pytest.approx(forgetting, abs=1e-4)
    assert optimal_specific(20, 0.3, 0.4).specific is None


TASK = Transition(60, 40, 300, 0.3, 0.0108, 0.0072, 0.1, 0.06, 0.1108, 0.0672)


def at(distance: float) -> Transition:
    return replace(TASK, shared_change=distance, shared_distance=distance + TASK.shared_error)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(5, 400), st.floats(0.05, 1), st.floats(0, 0.2))
def test_frozen_training_is_better_up_to_the_crossing(p, p2, more, noise, error):
    task = replace(TASK, shared=p, specific=p2, samples=p + p2 + more, noise=noise, shared_error=error)

    def gap(distance, what):
        moved = replace(task, shared_change=distance, shared_distance=distance + error)
        return getattr(frozen(moved), what) - getattr(initialized(moved), what)

    border = crossing(task)
    if border > 0:
        assert gap(border, "mean") == pytest.approx(0, abs=1e-9)
        assert gap(0.9 * border, "mean") < 0 < gap(1.1 * border, "mean")
    else:
        assert gap(0.0, "mean") >= -1e-12


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(5, 400), st.floats(0.05, 1), st.floats(0, 0.2))
@example(5, 20, 6, 0.5, 0.01)  # kappa = 2, an upper end
@example(5, 20, 6, 0.5, 1.0)  # kappa = 2, nowhere
@example(5, 20, 16, 0.5, 0.01)  # kappa = 1, everywhere
@example(5, 20, 16, 0.5, 1.0)  # kappa = 1, nowhere
def test_frozen_training_forgets_less_from_one_crossing_to_the_other(p, p2, more, noise, error):
    """The difference of the two outcomes is a line in the distance: where it is below zero."""
    task = replace(TASK, shared=p, specific=p2, samples=p + p2 + more, noise=noise, shared_error=error)

    def gap(distance):
        moved = replace(task, shared_change=distance, shared_distance=distance + error)
        return frozen(moved).forgetting - initialized(moved).forgetting

    where, start, slope = crossing_of_forgetting(task), gap(0.0), gap(1.0) - gap(0.0)
    if abs(start) < 1e-9:
        return
    if abs(slope) < 1e-9:
        assert where == ((0.0, float("inf")) if start < 0 else None)
    elif slope < 0:
        assert where == pytest.approx((max(-start / slope, 0.0), float("inf")))
    else:
        assert where == (pytest.approx((0.0, -start / slope)) if start < 0 else None)


def test_the_crossing_of_the_theory_page():
    assert crossing(TASK) == pytest.approx(0.1219, abs=1e-3)
    assert crossing_cosine(0.5, 1.0) == 0.75


def test_forgetting_and_error_count_alike():
    outcome = frozen(TASK)
    assert outcome.mean == pytest.approx(np.mean([outcome.forgetting, outcome.error]))


def test_without_a_shared_part_both_are_the_same():
    task = replace(TASK, shared=0, shared_error=0.0, shared_change=0.0, shared_distance=0.0)
    for samples in (20, 300):
        one, other = (train(replace(task, samples=samples)) for train in (frozen, initialized))
        assert (one.forgetting, one.error, one.regime) == pytest.approx(
            (other.forgetting, other.error, other.regime)
        ) or (one == other)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 45))
def test_too_few_or_too_many_samples_are_refused_and_all_others_answered(p, p2, n):
    """Within one of as many samples as trained parameters the expected error is infinite; crossings want more."""
    shared = 0.1 if p else 0.0
    task = Transition(p, p2, n, 0.3, shared, 0.1, shared, 0.1, shared, 0.1)
    first = FirstTask(p, p2, n, 0.3, shared, 1.0, shared, 0.1)
    calls = {
        lambda: frozen(task).error: abs(p2 - n) > 1,
        lambda: initialized(task).error: abs(p + p2 - n) > 1,
        lambda: first.then(5).specific_error: abs(p + p2 - n) > 1,
        lambda: sequence(p2, n, [0.1] * 2, [[0.0, 1.0], [1.0, 0.0]], [1.0] * 2).errors[-1][-1]: abs(p2 - n) > 1,
        lambda: crossing(task): p > 0 and n > p + p2 + 1,
        lambda: crossing_of_forgetting(task): p > 0 and n > p + p2 + 1,
    }
    for call, answered in calls.items():
        if answered:
            found = call()
            assert not isinstance(found, float) or np.isfinite(found)
        else:
            with pytest.raises(ValueError, match=r"samples|crossing distance"):
                call()


def test_what_the_formulas_do_not_cover_is_refused():
    with pytest.raises(ValueError, match=r"40 trained parameters for 40 samples.*expected error is infinite"):
        frozen(replace(TASK, samples=40))
    with pytest.raises(ValueError, match="100 trained parameters for 101 samples"):
        initialized(replace(TASK, samples=101))
    with pytest.raises(ValueError, match="a crossing distance for p=60, p_2=40, n=80"):
        crossing(replace(TASK, samples=80))
    with pytest.raises(ValueError, match="noise"):
        replace(TASK, noise=float("nan"))
    with pytest.raises(ValueError, match="specific=0"):
        replace(TASK, specific=0)
    with pytest.raises(ValueError, match="1 noises"):
        sequence(10, 3, [0.1], [[0.0]], [1.0])
    with pytest.raises(ValueError, match="got gain"):
        optimal_specific(5, float("inf"), 0.1)
    changes = [[0.0, 1.0], [1.0, 0.0]]
    for trained, samples, noises, start, message in (
        (0, 5, [0.1, 0.1], [1.0, 1.0], "trained=0"),
        (10, -5, [0.1, 0.1], [1.0, 1.0], "samples=-5"),
        (10, 5, [0.1, -1.0], [1.0, 1.0], "a number of noises=-1.0"),
        (10, 5, [0.1, 0.1], [float("nan"), 1.0], "a number of start=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            sequence(trained, samples, noises, changes, start)
    with pytest.raises(ValueError, match="a number of changes=-1.0"):
        sequence(10, 5, [0.1, 0.1], [[0.0, -1.0], [1.0, 0.0]], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"no shared parameter, but shared_error=0.0108.*zeros"):
        replace(TASK, shared=0)
    with pytest.raises(ValueError, match=r"shared_turn=-5.0 with shared_size=1.0 and shared_change=0.1.*norms"):
        FirstTask(6, 4, 30, 0.3, 1.0, 1.0, 0.1, 0.1, shared_turn=-5.0)


def test_the_examples_of_the_page_give_what_it_says():
    page = Path(__file__).parents[2] / "docs" / "magnitude.md"
    done = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert (done.failed, done.attempted > 5) == (0, True)
