r"""Definitions of average accuracy and forgetting, all from one accuracy matrix.

`a[t][j]` is the accuracy on task j after training task t, j <= t; what lies above the diagonal is not read here.
The field gives the name "forgetting" to formulas that differ by a factor of four on the same run, so each has its own
key here, and its formula travels with it (`DEFINITIONS`).
"""

from collections.abc import Callable, Sequence
from statistics import fmean

from forgetcast.checks import complaint

Matrix = Sequence[Sequence[float | None]]


def average_accuracy(a: Matrix) -> float:
    """Mean over stages t of the mean accuracy on the tasks seen so far."""
    return fmean(fmean(row) for row in triangle(a))


def last_accuracy(a: Matrix) -> float:
    """Mean accuracy over all tasks after the last one."""
    return fmean(triangle(a)[-1])


def learning_accuracy(a: Matrix) -> float:
    """Mean accuracy on each task just after training it."""
    return fmean(row[-1] for row in triangle(a))


def triangular_accuracy(a: Matrix) -> float:
    """Mean of all a_tj with j <= t (arXiv 1810.13166)."""
    return fmean(value for row in triangle(a) for value in row)


def first_minus_last(a: Matrix) -> float:
    """Mean over earlier tasks of the accuracy just after training minus at the end; -BWT of arXiv 1706.08840."""
    rows = several_tasks(a)
    return fmean(rows[j][j] - rows[-1][j] for j in range(len(rows) - 1))


def best_minus_last(a: Matrix) -> float:
    """Mean over earlier tasks of the best accuracy ever (the end included) minus at the end; never negative."""
    rows = several_tasks(a)
    return fmean(max(row[j] for row in rows[j:]) - rows[-1][j] for j in range(len(rows) - 1))


def best_before_minus_last(a: Matrix) -> float:
    """Mean over earlier tasks of the best accuracy before the end minus at the end (arXiv 1801.10112)."""
    rows = several_tasks(a)
    return fmean(max(row[j] for row in rows[j:-1]) - rows[-1][j] for j in range(len(rows) - 1))


def consecutive_drop(a: Matrix) -> float:
    """Mean over stages of the mean drop of the earlier tasks in that stage alone."""
    rows = several_tasks(a)
    return fmean(fmean(rows[t - 1][j] - rows[t][j] for j in range(t)) for t in range(1, len(rows)))


def negative_backward_transfer(a: Matrix) -> float:
    """Mean over all pairs j < t of a_jj - a_tj (all steps, arXiv 1810.13166, sign turned)."""
    rows = several_tasks(a)
    return fmean(rows[j][j] - rows[t][j] for t in range(1, len(rows)) for j in range(t))


def libcontinual_forgetting(a: Matrix) -> float:
    """First minus last as LibContinual codes it: the last but one task is left out, the divisor stays T - 1."""
    rows = several_tasks(a)
    return sum(rows[j][j] - rows[-1][j] for j in range(len(rows) - 2)) / (len(rows) - 1)


def libcontinual_backward_transfer(a: Matrix) -> float:
    """Mean of a_tj - a_jj as LibContinual and Continuum code it: without pairs j = t - 1, but over T (T - 1) / 2."""
    rows = several_tasks(a)
    tasks = len(rows)
    return 2 * sum(rows[t][j] - rows[j][j] for t in range(2, tasks) for j in range(t - 1)) / (tasks * (tasks - 1))


def continuum_forgetting(a: Matrix) -> float:
    """Best minus last as Continuum codes it: neither task nor stage T - 1 is read, the divisor stays T - 1."""
    rows = several_tasks(a)
    tasks = len(rows)
    return sum(max(row[j] for row in rows[j : tasks - 2]) - rows[-1][j] for j in range(tasks - 2)) / (tasks - 1)


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
        libcontinual_forgetting,
        libcontinual_backward_transfer,
        continuum_forgetting,
    )
}
DEFINITIONS = {name: (function.__doc__ or "").strip() for name, function in METRICS.items()}


def all_metrics(a: Matrix) -> dict[str, float]:
    """Every metric of the matrix, by the name of its definition; those of forgetting from two tasks on."""
    several = len(triangle(a)) > 1
    accuracies = (average_accuracy, last_accuracy, learning_accuracy, triangular_accuracy)
    return {name: metric(a) for name, metric in METRICS.items() if several or metric in accuracies}


def triangle(a: Matrix) -> list[list[float]]:
    """The entries up to the diagonal, each row t of t + 1 accuracies.

    Raises:
        ValueError: no rows, an entry that is missing or no accuracy.
    """
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


def several_tasks(a: Matrix) -> list[list[float]]:
    """`triangle` of at least two tasks.

    Raises:
        ValueError: as `triangle`, and one task only.
    """
    rows = triangle(a)
    if len(rows) < 2:
        raise complaint(
            "an accuracy matrix of one task", "at least two tasks", "Forgetting needs an earlier task to be forgotten."
        )
    return rows
