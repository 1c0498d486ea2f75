r"""Definitions of average accuracy and forgetting, all from one accuracy matrix.

`a[t][j]` is the accuracy on task j after training task t, j <= t; what lies above the diagonal is never read.
The field gives the name "forgetting" to formulas that differ by a factor of four on the same run, so each has its own
key here, and its formula travels with it (`DEFINITIONS`).
"""

from collections.abc import Callable, Sequence
from statistics import fmean

from forgetcast.checks import complaint

Matrix = Sequence[Sequence[float | None]]


def average_accuracy(a: Matrix) -> float:
    """Mean over stages t of the mean accuracy on the tasks seen so far."""
    return fmean(fmean(row) for row in _triangle(a))


def last_accuracy(a: Matrix) -> float:
    """Mean accuracy over all tasks after the last one."""
    return fmean(_triangle(a)[-1])


def learning_accuracy(a: Matrix) -> float:
    """Mean accuracy on each task just after training it."""
    return fmean(row[-1] for row in _triangle(a))


def triangular_accuracy(a: Matrix) -> float:
    """Mean of all a_tj with j <= t (arXiv 1810.13166)."""
    return fmean(value for row in _triangle(a) for value in row)


def first_minus_last(a: Matrix) -> float:
    """Mean over earlier tasks of the accuracy just after training minus at the end; -BWT of arXiv 1706.08840."""
    rows = _several(a)
    return fmean(rows[j][j] - rows[-1][j] for j in range(len(rows) - 1))


def best_minus_last(a: Matrix) -> float:
    """Mean over earlier tasks of the best accuracy ever (the end included) minus at the end; never negative."""
    rows = _several(a)
    return fmean(max(row[j] for row in rows[j:]) - rows[-1][j] for j in range(len(rows) - 1))


def best_before_minus_last(a: Matrix) -> float:
    """Mean over earlier tasks of the best accuracy before the end minus at the end (arXiv 1801.10112)."""
    rows = _several(a)
    return fmean(max(row[j] for row in rows[j:-1]) - rows[-1][j] for j in range(len(rows) - 1))


def consecutive_drop(a: Matrix) -> float:
    """Mean over stages of the mean drop of the earlier tasks in that stage alone."""
    rows = _several(a)
    return fmean(fmean(rows[t - 1][j] - rows[t][j] for j in range(t)) for t in range(1, len(rows)))


def negative_backward_transfer(a: Matrix) -> float:
    """Mean over all pairs j < t of a_jj - a_tj (all steps, arXiv 1810.13166, sign turned)."""
    rows = _several(a)
    return fmean(rows[j][j] - rows[t][j] for t in range(1, len(rows)) for j in range(t))


METRICS: dict[str, Callable[[Matrix], float]] = {
    function.__name__: function
    for function in (
        average_accuracy,
        last_accuracy,
        learning_accuracy,
        triangular_accuracy,
        first_minus_last,
        best_minus_last,
        best_before_minus_last,
        consecutive_drop,
        negative_backward_transfer,
    )
}
DEFINITIONS = {name: (function.__doc__ or "").strip() for name, function in METRICS.items()}


def all_metrics(a: Matrix) -> dict[str, float]:
    """Every metric of the matrix, by the name of its definition; those of forgetting from two tasks on."""
    several = len(_triangle(a)) > 1
    accuracies = (average_accuracy, last_accuracy, learning_accuracy, triangular_accuracy)
    return {name: metric(a) for name, metric in METRICS.items() if several or metric in accuracies}


def _triangle(a: Matrix) -> list[list[float]]:
    rows: list[list[float]] = []
    for t, row in enumerate(a):
        values = [value for value in row[: t + 1] if value is not None and 0 <= value <= 100]
        if len(values) != t + 1:
            raise complaint(
                f"row {t} of the accuracy matrix is {list(row)}",
                f"{t + 1} accuracies (shares or points), one for each task trained so far",
                "Evaluate every task seen so far after each task.",
            )
        rows.append(values)
    if not rows:
        raise complaint("an accuracy matrix without rows", "one row for each trained task", "Train a task first.")
    return rows


def _several(a: Matrix) -> list[list[float]]:
    rows = _triangle(a)
    if len(rows) < 2:
        raise complaint(
            "an accuracy matrix of one task", "at least two tasks", "Forgetting needs an earlier task to be forgotten."
        )
    return rows
