"""The best order of tasks, by forecast: every order up to seven tasks, greedy with pairwise exchanges beyond."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Literal

from forgetcast.checks import require_choice
from forgetcast.forecast.sequence import (
    LossOutputs,
    Weight,
    check_sequence,
    narrowed,
    outputs_of,
    task_advance,
    union,
)
from forgetcast.forecast.training import Training
from forgetcast.tangent.features import Features, check_labels
from forgetcast.tangent.linear_head import LinearHead, apply_head
from forgetcast.tangent.moments import Moments

Objective = Literal["accuracy", "squared_error", "drift"]
Order = tuple[int, ...]
Score = Callable[[Order, Sequence[Weight]], float]
EXHAUSTIVE_UP_TO = 7


@dataclass(frozen=True)
class OrderForecast:
    """The best order found, and what it is forecast to gain over the order given.

    Attributes:
        order: indices of the given tasks, first to train first.
        value: the objective, forecast for that order.
        given_value: the same for the order given.
        gain: by how much the best order is better; never negative.
        objective: "accuracy" (mean over tasks at the end, higher is better), "squared_error" (mean over tasks at the
            end) or "drift" (mean over earlier tasks of the mean squared logit change since their own training).
        search: "exhaustive" (proven best) or "greedy and exchange".
        evaluated: complete orders that were compared.
    """

    order: Order
    value: float
    given_value: float
    gain: float
    objective: Objective
    search: str
    evaluated: int


def best_order(
    tasks: Sequence[Features],
    head: LinearHead,
    training: Training,
    *,
    objective: Objective = "accuracy",
    evaluation: Sequence[Features] | None = None,
    loss_outputs: LossOutputs = "all",
) -> OrderForecast:
    """The task order that is forecast to end best; nothing is trained.

    Args:
        tasks: training features and targets, in the order that `gain` is measured against.
        head: the head at the start, with the outputs of all tasks.
        training: how each task will be trained.
        objective: what is compared.
        evaluation: samples to evaluate on; the training samples by default.
        loss_outputs: as in `forecast_sequence`.

    Raises:
        ValueError: whatever `forecast_sequence` refuses.

    Cost: each task is read once. For the closed forms a step costs 6 d^2 C; T! orders share their prefixes. An
    evaluation costs n d C for "accuracy" and T d^2 C for the others. Cross-entropy is simulated anew at each step.
    """
    require_choice("objective", objective, ("accuracy", "squared_error", "drift"))
    tasks, evaluation = check_sequence(tasks, evaluation, head, training)
    for features in evaluation if objective == "accuracy" else ():
        if features.is_array:
            check_labels(features.name, features.y, head.outputs)
    outputs = outputs_of(tasks, head)
    steps = [task_advance(task, head, training) for task in tasks]
    accuracy = objective == "accuracy"
    score = _accuracy_score(evaluation, outputs, head) if accuracy else _moment_score(evaluation, head, objective)

    def extend(prefix: Order, weights: Sequence[Weight], task: int) -> tuple[Order, list[Weight]]:
        order = (*prefix, task)
        step = narrowed(training, [outputs[index] for index in order], loss_outputs)
        return order, [*weights, steps[task](weights[-1] if weights else start, step)]

    start = head.stacked()
    search = _exhaustive if len(tasks) <= EXHAUSTIVE_UP_TO else _greedy
    given: tuple[Order, list[Weight]] = ((), [])
    for task in range(len(tasks)):
        given = extend(*given, task)
    given_score = score(*given)
    order, value, evaluated = search(len(tasks), extend, score)
    if given_score <= value:  # a tie, or a greedy search that found nothing better
        order, value = given[0], given_score
    sign = -1.0 if accuracy else 1.0
    name = "exhaustive" if search is _exhaustive else "greedy and exchange"
    return OrderForecast(order, sign * value, sign * given_score, given_score - value, objective, name, evaluated)


Extend = Callable[[Order, Sequence[Weight], int], tuple[Order, list[Weight]]]


def _exhaustive(count: int, extend: Extend, score: Score) -> tuple[Order, float, int]:
    """Depth first over all permutations: orders with a common prefix train it once."""
    best: tuple[Order, float] = ((), float("inf"))
    evaluated = 0

    def visit(prefix: Order, weights: Sequence[Weight]) -> None:
        nonlocal best, evaluated
        if len(prefix) == count:
            evaluated += 1
            value = score(prefix, weights)
            best = (prefix, value) if value < best[1] else best
            return
        for task in range(count):
            if task not in prefix:
                visit(*extend(prefix, weights, task))

    visit((), [])
    return *best, evaluated


def _greedy(count: int, extend: Extend, score: Score) -> tuple[Order, float, int]:
    """Append the task that scores best so far; then exchange pairs for as long as that helps."""
    prefix: Order = ()
    weights: Sequence[Weight] = []
    while len(prefix) < count:
        candidates = [extend(prefix, weights, task) for task in range(count) if task not in prefix]
        prefix, weights = min(candidates, key=lambda candidate: score(*candidate))
    best, value, evaluated = prefix, score(prefix, weights), 1
    improved = True
    while improved:
        improved = False
        for i, j in combinations(range(count), 2):
            swapped = list(best)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            state: tuple[Order, list[Weight]] = ((), [])
            for task in swapped:
                state = extend(*state, task)
            evaluated += 1
            candidate = score(*state)
            if candidate < value:
                best, value, improved = state[0], candidate, True
    return best, value, evaluated


def _accuracy_score(evaluation: Sequence[Features], outputs: Sequence[tuple[int, ...]], head: LinearHead) -> Score:
    """Minus the mean over trained tasks of their accuracy at the end, over the outputs seen."""

    def score(order: Order, weights: Sequence[Weight]) -> float:
        seen = list(union([outputs[task] for task in order]))
        return -fmean(_accuracy(evaluation[task], weights[-1], seen, head.outputs) for task in order)

    return score


def _accuracy(features: Features, weight: Weight, seen: list[int], outputs: int) -> float:
    hits, rows = 0, 0
    for phi, y in features.blocks():
        labels = check_labels(features.name, y, outputs).to(phi.device)
        scored = labels.new_tensor(seen)
        hits += int((scored[apply_head(weight[:, seen], phi).argmax(1)] == labels).sum())
        rows += len(phi)
    return hits / rows


def _moment_score(evaluation: Sequence[Features], head: LinearHead, objective: Objective) -> Score:
    """Mean squared error at the end, or mean squared drift since a task's own training; both from moments."""
    rows = head.width if head.bias is None else head.width + 1
    moments = [Moments.of(features, head.outputs) for features in evaluation]

    def error(task: int, weight: Weight) -> float:
        own = moments[task]
        total = float((weight * (own.gram[:rows, :rows] @ weight - 2 * own.cross[:rows])).sum()) + own.target_square
        return total / (own.rows * head.outputs)

    def drift(task: int, step: Weight) -> float:
        own = moments[task]
        return float((step * (own.gram[:rows, :rows] @ step)).sum()) / own.rows

    def score(order: Order, weights: Sequence[Weight]) -> float:
        if objective == "squared_error":
            return fmean(error(task, weights[-1]) for task in order)
        if len(order) < 2:
            return 0.0
        return fmean(drift(task, weights[-1] - weights[place]) for place, task in enumerate(order[:-1]))

    return score
