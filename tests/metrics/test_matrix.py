"""Every definition has its own number on one hand-written matrix."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetcast.metrics.matrix import (
    DEFINITIONS,
    METRICS,
    all_metrics,
)

MATRIX = [[90.0, None, None], [92.0, 85.0, None], [70.0, 88.0, 95.0]]
ORACLE = {
    "average_accuracy": 87.6111,
    "last_accuracy": 84.3333,
    "learning_accuracy": 90.0,
    "triangular_accuracy": 86.6667,
    "first_minus_last": 8.5,
    "best_minus_last": 11.0,
    "best_before_minus_last": 9.5,
    "consecutive_drop": 3.75,
    "negative_backward_transfer": 5.0,
    "libcontinual_forgetting": 10.0,
    "libcontinual_backward_transfer": -6.6667,
    "continuum_forgetting": 10.0,
}


@pytest.mark.parametrize("name", ORACLE)
def test_definition(name):
    assert METRICS[name](MATRIX) == pytest.approx(ORACLE[name], abs=1e-4)


def test_all_metrics_carry_a_definition():
    assert set(all_metrics(MATRIX)) == set(ORACLE) == set(DEFINITIONS)
    assert all(DEFINITIONS.values())
    assert set(all_metrics([[80.0]])) == {n for n in ORACLE if n.endswith("accuracy")}


@given(
    st.integers(2, 6).flatmap(
        lambda t: st.lists(st.lists(st.floats(0, 1), min_size=t, max_size=t), min_size=t, max_size=t)
    )
)
def test_last_accuracy_is_the_diagonal_less_forgetting(a):
    tasks = len(a)
    value = METRICS["learning_accuracy"](a) - (tasks - 1) / tasks * METRICS["first_minus_last"](a)
    assert METRICS["last_accuracy"](a) == pytest.approx(value, abs=1e-9)
    assert METRICS["best_minus_last"](a) >= max(0, METRICS["first_minus_last"](a)) - 1e-12


@pytest.mark.parametrize("bad", [[[0.5], [None, 0.5]], [[0.5], [0.5]], [[-0.1]], []])
def test_incomplete_matrices_are_refused(bad):
    with pytest.raises(ValueError, match="accuracy matrix.*expected"):
        all_metrics(bad)


def test_forgetting_needs_two_tasks():
    with pytest.raises(ValueError, match="matrix of one task; expected at least two tasks"):
        METRICS["first_minus_last"]([[0.5]])
