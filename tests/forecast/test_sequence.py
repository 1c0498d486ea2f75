"""A sequence forecast equals training task after task, and the block Gauss-Seidel sweep over the joint kernel."""

import itertools
from dataclasses import replace

import pytest
import torch

import forgetcast as fc
from builders import features, head, labels, relative_error, train
from forgetcast.metrics.matrix import all_metrics


def stream(count: int = 4, width: int = 9, rows: int = 25):
    """Tasks of two classes each, whose classes are told apart by a shift of their features."""
    centres = features(2 * count, width, decay=0.1, seed=50) * 3
    tasks = []
    for task in range(count):
        y = labels(rows + task, 2 * task, 2 * task + 2, seed=task)
        tasks.append((features(rows + task, width, decay=0.3, seed=task) + centres[y], y))
    return tasks


TRAININGS = [
    fc.Ridge(0.5),
    fc.Ridge(0.5, toward="zero"),
    fc.GradientDescent(0.05, 40, momentum=0.5),
    fc.GradientDescent(0.05, 40, loss="cross_entropy"),
    fc.AdamW(0.01, 20, batch_size=8),
]


def trained(tasks, start, training, loss_outputs="all"):
    heads, seen = [], []
    for phi, y in tasks:
        own = sorted(set(y.tolist()))
        seen = sorted({*seen, *own})
        classes = {"all": None, "seen": tuple(seen), "task": tuple(own)}[loss_outputs]
        start = train(phi, y, start, replace(training, classes=classes))
        heads.append(start)
    return heads


@pytest.mark.parametrize("training", [TRAININGS[2], TRAININGS[3]], ids=["squared", "cross-entropy"])
@pytest.mark.parametrize("loss_outputs", ["all", "seen", "task"])
def test_sequence_equals_training_task_after_task(training, loss_outputs):
    tasks, start = stream(), head(9, 8)
    forecast = fc.forecast_sequence([fc.Features(*task) for task in tasks], start, training, loss_outputs=loss_outputs)
    heads = trained(tasks, start, training, loss_outputs)
    for index, (phi, _) in enumerate(tasks[:-1]):
        truth = heads[-1].logits(phi) - heads[index].logits(phi)
        assert relative_error(forecast.drift(index), truth) <= 1e-9
    for stage, after in enumerate(heads):
        seen = sorted({label for _, y in tasks[: stage + 1] for label in y.tolist()})
        for index, (phi, y) in enumerate(tasks[: stage + 1]):
            answers = torch.tensor(seen)[after.logits(phi)[:, seen].argmax(1)]
            assert forecast.accuracy_matrix[stage][index] == pytest.approx(float((answers == y).double().mean()))
    assert forecast.metrics == all_metrics(forecast.accuracy_matrix)


def test_ridge_sequence_is_one_gauss_seidel_sweep():
    """F7, F8 and F9 of the theory, on the dense joint kernel."""
    tasks, start, penalty = stream(), head(9, 8), 0.5
    forecast = fc.forecast_sequence([fc.Features(*task) for task in tasks], start, fc.Ridge(penalty))
    phi = torch.cat([torch.cat([p, torch.ones(len(p), 1).double()], 1) for p, _ in tasks])
    y = torch.nn.functional.one_hot(torch.cat([y for _, y in tasks]), 8).double()
    residual = phi @ start.stacked() - y
    kernel = phi @ phi.T
    edges = list(itertools.accumulate((len(p) for p, _ in tasks), initial=0))
    blocks = [slice(a, b) for a, b in itertools.pairwise(edges)]
    lower = torch.zeros_like(kernel)
    for i, j in itertools.product(range(len(blocks)), repeat=2):
        if j <= i:
            lower[blocks[i], blocks[j]] = kernel[blocks[i], blocks[j]]
    lower += penalty * torch.eye(len(kernel)).double()
    a = torch.linalg.solve(lower, residual)
    upper = kernel + penalty * torch.eye(len(kernel)).double() - lower
    forgetting = -upper @ a
    for index, block in enumerate(blocks):
        assert float((forecast.drift(index) - forgetting[block]).norm()) <= 1e-10 * float(forgetting.norm())
    sequential = phi @ forecast.weights[-1]
    joint = phi @ start.stacked() - kernel @ torch.linalg.solve(
        kernel + penalty * torch.eye(len(kernel)).double(), residual
    )
    smoother = torch.linalg.solve(kernel + penalty * torch.eye(len(kernel)).double(), forgetting)
    assert relative_error(joint - sequential, -kernel @ smoother) <= 1e-9


@pytest.mark.parametrize("objective", ["accuracy", "squared_error", "drift"])
@pytest.mark.parametrize("training", TRAININGS, ids=lambda t: type(t).__name__ + getattr(t, "toward", t.loss))
def test_best_order_is_the_best_of_all(training, objective):
    tasks, start = [fc.Features(*task) for task in stream(3)], head(9, 6)
    best = fc.best_order(tasks, start, training, objective=objective)
    values = {}
    for order in itertools.permutations(range(3)):
        forecast = fc.forecast_sequence([tasks[i] for i in order], start, training)
        if objective == "accuracy":
            values[order] = sum(forecast.accuracy_matrix[-1]) / 3
        elif objective == "drift":
            values[order] = sum(float(forecast.drift(i).square().sum(1).mean()) for i in range(2)) / 2
        else:
            end = forecast.head_after(2)
            errors = []
            for task in tasks:
                target = torch.nn.functional.one_hot(task.y, 6).double()
                errors.append(float((end.logits(task.phi) - target).square().mean()))
            values[order] = sum(errors) / 3
    wanted = max(values.values()) if objective == "accuracy" else min(values.values())
    assert best.value == pytest.approx(wanted, rel=1e-8)
    assert values[best.order] == pytest.approx(wanted, rel=1e-8)
    assert best.given_value == pytest.approx(values[0, 1, 2], rel=1e-8)
    assert best.gain == pytest.approx(abs(wanted - values[0, 1, 2]), rel=1e-6, abs=1e-9)
    assert (best.search, best.evaluated) == ("exhaustive", 6)


@pytest.mark.parametrize("objective", ["accuracy", "squared_error", "drift"])
def test_greedy_order_of_many_tasks_keeps_its_word(objective):
    tasks, start = [fc.Features(*task) for task in stream(8, rows=12)], head(9, 16)
    best = fc.best_order(tasks, start, fc.Ridge(0.5), objective=objective)
    assert sorted(best.order) == list(range(8))
    assert best.search == "greedy and exchange"
    assert best.gain >= 0
    again = fc.best_order([tasks[i] for i in best.order], start, fc.Ridge(0.5), objective=objective)
    assert again.given_value == pytest.approx(best.value, rel=1e-8)


def test_a_generator_cannot_be_a_task():
    phi, y = stream(1)[0]
    with pytest.raises(ValueError, match="read once; expected features that can be read again"):
        fc.forecast_sequence([fc.Features(pair for pair in [(phi, y)])], head(9, 2), fc.Ridge(1.0))
    with pytest.raises(ValueError, match="sequence of no tasks"):
        fc.forecast_sequence([], head(9, 2), fc.Ridge(1.0))
    both = fc.Ridge(1.0, classes=(0, 1))
    with pytest.raises(ValueError, match="loss_outputs='task' beside"):
        fc.forecast_sequence([fc.Features(phi, y)], head(9, 2), both, loss_outputs="task")


@pytest.mark.parametrize("bias", [True, False])
def test_no_exchange_of_two_tasks_improves_the_greedy_order(bias):
    tasks, start = [fc.Features(*task) for task in stream(8, rows=12)], head(9, 16, bias=bias)

    def drift(order):
        forecast = fc.forecast_sequence([tasks[i] for i in order], start, fc.Ridge(0.5))
        return sum(float(forecast.drift(i).square().sum(1).mean()) for i in range(7)) / 7

    best = fc.best_order(tasks, start, fc.Ridge(0.5), objective="drift")
    assert drift(best.order) == pytest.approx(best.value, rel=1e-8)
    for i, j in itertools.combinations(range(8), 2):
        swapped = list(best.order)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        assert drift(swapped) >= best.value * (1 - 1e-9)
