r"""Definitions of average accuracy and forgetting, all from one accuracy matrix.

`a[t][j]` is the accuracy on task j after training task t, j <= t; what lies above the diagonal is read by
`forward_transfer` alone.
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


def libcontinual_forgetting(a: Matrix) -> float:
    """First minus last as LibContinual codes it: the last but one task is left out, the divisor stays T - 1."""
    rows = _several(a)
    return sum(rows[j][j] - rows[-1][j] for j in range(len(rows) - 2)) / (len(rows) - 1)


def libcontinual_backward_transfer(a: Matrix) -> float:
    """Mean of a_tj - a_jj as LibContinual codes it: pairs j = t - 1 are left out, the divisor stays T (T - 1) / 2."""
    rows = _several(a)
    tasks = len(rows)
    return 2 * sum(rows[t][j] - rows[j][j] for t in range(2, tasks) for j in range(t - 1)) / (tasks * (tasks - 1))


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
    )
}
DEFINITIONS = {name: (function.__doc__ or "").strip() for name, function in METRICS.items()}


def all_metrics(a: Matrix) -> dict[str, float]:
    """Every metric of the matrix, by the name of its definition; those of forgetting from two tasks on."""
    several = len(_triangle(a)) > 1
    accuracies = (average_accuracy, last_accuracy, learning_accuracy, triangular_accuracy)
    return {name: metric(a) for name, metric in METRICS.items() if several or metric in accuracies}


def average_anytime_accuracy(evaluations: Matrix) -> float:
    """Mean over all evaluations of the mean accuracy on the tasks seen by then (arXiv 2104.05025).

    With one evaluation a task, at its end, this is `average_accuracy`.

    Args:
        evaluations: one row for each evaluation in order, any number of them a task; each row holds one accuracy for
            each task seen by then, None (or nothing) for the others.

    Raises:
        ValueError: no evaluation, one without accuracies or out of order, or a value that is no accuracy.
    """
    if not evaluations:
        raise complaint("no evaluations", "at least one row of accuracies", "Evaluate while training.")
    rows = [[value for value in row if value is not None] for row in evaluations]
    least = 1
    for i, row in enumerate(rows):
        if len(row) < least or not _are_accuracies(row):
            raise complaint(
                f"evaluation {i} is {list(evaluations[i])}",
                f"at least {least} accuracies (shares or points), as many as tasks seen by then",
                "Evaluate every task seen so far, and give the evaluations in order.",
            )
        least = len(row)
    return fmean(fmean(row) for row in rows)


def forward_transfer(a: Matrix, baseline: Sequence[float]) -> float:
    """Mean over later tasks of the accuracy just before training them minus that of a blank model.

        1 / (T - 1) sum_{j >= 2} (a_{j-1, j} - b_j)          (arXiv 1706.08840, eq. 4)

    Args:
        a: the matrix with the entry right of each diagonal one filled in.
        baseline: b, one accuracy a task of the model before any training; that of the first is not used.

    Raises:
        ValueError: an entry right of the diagonal is missing, or a baseline that does not fit.
    """
    tasks = len(_several(a))
    _require_one_for_each("baseline", baseline, tasks)
    ahead = [a[j - 1][j] if len(a[j - 1]) > j else None for j in range(1, tasks)]
    known = [value for value in ahead if value is not None]
    if len(known) < len(ahead) or not _are_accuracies(known):
        raise complaint(
            f"accuracies on the tasks to come are {ahead}",
            "one a task, measured just before it is trained",
            "Evaluate the next task too, before training it.",
        )
    return fmean(value - start for value, start in zip(known, baseline[1:], strict=True))


def intransigence(a: Matrix, reference: Sequence[float]) -> float:
    """Mean over tasks of a reference's accuracy minus that just after training; what protecting cost in learning.

        1 / T sum_j (a*_j - a_jj)          (arXiv 1801.10112, eq. 3, averaged)

    Args:
        a: the accuracy matrix.
        reference: a*, the accuracy on task j of a model trained jointly on tasks 1..j.

    Raises:
        ValueError: references that do not fit the matrix.
    """
    rows = _triangle(a)
    _require_one_for_each("reference", reference, len(rows))
    return fmean(best - row[-1] for best, row in zip(reference, rows, strict=True))


def _are_accuracies(values: Sequence[float]) -> bool:
    return all(0 <= value <= 100 for value in values)


def _require_one_for_each(name: str, values: Sequence[float], tasks: int) -> None:
    if len(values) != tasks or not _are_accuracies(values):
        raise complaint(
            f"got {name}={list(values)}", f"{tasks} accuracies (shares or points), one a task", f"Correct {name}."
        )


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
