"""The recursive kernel solution against ridge in weight space; bounds that hold; factors that mean what they say."""

import doctest
from dataclasses import replace
from math import log, sqrt
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from sklearn.datasets import load_digits

import forgetcast as fc
from builders import DOUBLE, features, head, labels, relative_error
from forgetcast.forecast.gaps import TaskGaps
from forgetcast.forecast.lazy import LazyTask, lazy_drift, lazy_outputs, lazy_tasks
from forgetcast.tangent.blocks import TaskKernels
from forgetcast.tangent.spectrum import kernel_overlap

SIZES, WIDTH, OUTPUTS = (12, 7, 15), 9, 3


def randn(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def stream():
    phi = [features(n, WIDTH, decay=0.4, seed=k) for k, n in enumerate(SIZES)]
    return phi, [randn(n, OUTPUTS, seed=10 + k) for k, n in enumerate(SIZES)]


def trained(phi, targets, weight, penalty):
    """Ridge toward the previous weights by least squares in weight space, which knows no kernel."""
    weights = [weight]
    for rows, y in zip(phi, targets, strict=True):
        before = weights[-1]
        wide = torch.cat([rows, penalty**0.5 * torch.eye(rows.shape[1], dtype=DOUBLE)])
        rest = torch.cat([y - rows @ before, torch.zeros(rows.shape[1], y.shape[1], dtype=DOUBLE)])
        weights.append(before + torch.linalg.lstsq(wide, rest, driver="gelsd", rcond=1e-12).solution)
    return weights


def kron(block):
    """The same kernel with outputs of their own, (n, C, m, C)."""
    return torch.einsum("ij,cd->icjd", block, torch.eye(OUTPUTS, dtype=DOUBLE))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 0.3, 20.0])
def test_closed_form_is_ridge_task_after_task(penalty, full):
    """F10, F12, F13, F14; 7 samples are fewer than features and 15 more, so that no penalty has both its cases."""
    phi, targets = stream()
    start = randn(WIDTH, OUTPUTS, seed=20)
    weights = trained(phi, targets, start, penalty)
    kernels = TaskKernels.of_features(phi, bias=False)
    points = randn(5, WIDTH, seed=30)
    cross = [points @ rows.T for rows in phi]
    if full:
        kernels = TaskKernels(tuple(tuple(map(kron, row)) for row in kernels.blocks))
        cross = [kron(block) for block in cross]
    residuals = [rows @ start - y for rows, y in zip(phi, targets, strict=True)]
    tasks = lazy_tasks(kernels, residuals, penalty)
    assert relative_error(lazy_outputs(points @ start, tasks, cross), points @ weights[-1]) <= 1e-10
    for k, (task, rows, y) in enumerate(zip(tasks, phi, targets, strict=True)):
        assert relative_error(task.residual, rows @ weights[k] - y) <= 1e-10
        left = rows @ weights[k + 1] - y
        assert float((task.own_residual - left).norm()) <= 1e-10 * float(y.norm())
        step = float((weights[k + 1] - weights[k]).square().sum())
        assert task.step_square == pytest.approx(step, rel=1e-10)
        assert task.step_square <= task.step_bound * (1 + 1e-12)
        if penalty == 0:
            assert task.step_bound == pytest.approx(step, rel=1e-10)
        for after in range(k, 3):
            drift = rows @ (weights[after + 1] - weights[k + 1])
            assert float((lazy_drift(tasks, k, after) - drift).norm()) <= 1e-10 * float((rows @ weights[-1]).norm())
    gaps = TaskGaps(tasks)
    for k, (rows, y) in enumerate(zip(phi, targets, strict=True)):
        end = float((rows @ weights[-1] - y).square().sum()) / SIZES[k]
        assert gaps.table["end"][k] == pytest.approx(end, rel=1e-9, abs=1e-12)


def test_a_tangent_that_moves_between_tasks():
    """Each task has features of its own for all samples; functions add up while weights do not."""
    _, targets = stream()
    points, tasks, f = randn(4, OUTPUTS, seed=1), [], [torch.zeros_like(y) for y in targets]
    at_points, cross = points.clone(), []
    own = []
    for k in range(3):
        phi = [features(n, WIDTH, decay=0.3, seed=100 * k + s) for s, n in enumerate(SIZES)]
        there = randn(4, WIDTH, seed=40 + k)
        tasks.append(LazyTask(TaskKernels.of_features(phi, bias=False), k, f[k] - targets[k], 0.5))
        _, weight = trained([phi[k]], [targets[k] - f[k]], torch.zeros(WIDTH, OUTPUTS, dtype=DOUBLE), 0.5)
        f = [old + rows @ weight for old, rows in zip(f, phi, strict=True)]
        at_points, cross = at_points + there @ weight, [*cross, there @ phi[k].T]
        own.append(f[k])
    gaps = TaskGaps(tuple(tasks))
    assert relative_error(lazy_outputs(points, tasks, cross), at_points) <= 1e-10
    for k in range(2):
        assert relative_error(gaps.drift(k), f[k] - own[k]) <= 1e-10
        assert relative_error(gaps.residual(k), f[k] - targets[k]) <= 1e-10
    with pytest.raises(ValueError, match="kernels or penalties of their own; expected one tangent"):
        gaps.expected([3, 3, 3])


def test_the_same_drift_as_the_sequence_forecast_and_as_a_real_module():
    """The public entry on a torch.nn.Linear, against `forecast_sequence`, which works in weight space."""
    phi, _ = stream()
    y = [labels(n, 0, OUTPUTS, seed=k) for k, n in enumerate(SIZES)]
    start = head(WIDTH, OUTPUTS)
    forecast = fc.forecast_sequence([fc.Features(*task) for task in zip(phi, y, strict=True)], start, fc.Ridge(0.7))
    module = torch.nn.Linear(WIDTH, OUTPUTS, dtype=DOUBLE)
    module.weight.data, module.bias.data = start.weight.T.clone(), start.bias.clone()
    for trace in (True, False):
        gaps = fc.task_gaps(module, list(zip(phi, y, strict=True)), 0.7, trace=trace)
        for k in range(3):
            assert float((gaps.drift(k) - forecast.drift(k)).norm()) <= 1e-10 * float(forecast.drift(0).norm())


@settings(max_examples=40)
@given(
    sizes=some.lists(some.integers(1, 6), min_size=1, max_size=4),
    width=some.integers(1, 8),
    outputs=some.integers(1, 3),
    penalty=some.sampled_from([0.0, 1e-3, 0.3, 10.0]),
    seed=some.integers(0, 10_000),
)
def test_the_bound_holds(sizes, width, outputs, penalty, seed):
    """F16 with kernels of their own for each task, of any rank, and residuals that owe them nothing."""
    draw = torch.Generator().manual_seed(seed)
    tasks = []
    for k, n in enumerate(sizes):
        phi = [torch.randn(m, width, generator=draw, dtype=DOUBLE) for m in sizes]
        residual = torch.randn(n, outputs, generator=draw, dtype=DOUBLE)
        tasks.append(LazyTask(TaskKernels.of_features(phi, bias=False), k, residual, penalty))
    table = TaskGaps(tuple(tasks)).table
    assert (table["end"] <= table["bound"] * (1 + 1e-9) + 1e-12).all()
    assert (table["bound"] == table["own_term"] + table["interplay_term"]).all()
    assert table["interplay_term"].iloc[-1] == 0


def test_the_bound_is_met_where_all_later_tasks_add_the_same():
    """F16 with equality: own residual and all changes equal, so that no factor in it could be smaller."""
    ones = torch.ones(1, 1, dtype=DOUBLE)
    for later in (1, 2):
        count = later + 1
        kernels = TaskKernels(tuple(tuple(ones for _ in range(count)) for _ in range(count)))
        # own residual r/2; a step of -1/2 of a residual is a change: all equal (r/2) / later
        tasks = [LazyTask(kernels, 0, 2 * ones, 1.0)]
        tasks += [LazyTask(kernels, k, -2 * ones / later, 1.0) for k in range(1, count)]
        table = TaskGaps(tuple(tasks)).table
        assert table["end"][0] == pytest.approx(4.0)
        assert table["bound"][0] == pytest.approx(4.0)


@pytest.mark.parametrize("outputs", [1, OUTPUTS])
def test_rademacher_sum_against_drawn_signs(outputs):
    """F17: sup over the balls is `sum_k B_k sqrt(e^T K e) / n`; its mean over signs lies under the bound, and near."""
    phi, targets = stream()
    kernels = TaskKernels.of_features(phi, bias=False)
    gaps = TaskGaps(lazy_tasks(kernels, [-y[:, :outputs] for y in targets], 0.5))
    draw = torch.Generator().manual_seed(0)
    for k, n in enumerate(SIZES):
        signs = torch.randint(0, 2, (20_000, n, outputs), generator=draw).to(DOUBLE) * 2 - 1
        radius = sum(task.step_bound**0.5 for task in gaps.tasks)
        width = torch.einsum("snc,nm,smc->s", signs, kernels.matrix(k, k), signs).sqrt().mean()
        drawn = radius * float(width) / n
        assert 0.85 * gaps.rademacher(k) < drawn < gaps.rademacher(k)


def test_bounds_of_the_expected_loss():
    phi, targets = stream()
    kernels = TaskKernels.of_features(phi)
    single, several = (TaskGaps(lazy_tasks(kernels, [-y[:, :count] for y in targets], 0.5)) for count in (1, OUTPUTS))
    for gaps, factor in ((single, 1.0), (several, sqrt(2))):
        found = gaps.bounds(lipschitz=2.0, largest=5.0, confidence=0.9)
        for k, n in enumerate(SIZES):
            assert found["complexity"][k] == pytest.approx(2 * 2.0 * factor * gaps.rademacher(k))
            assert found["deviation"][k] == pytest.approx(3 * 5.0 * sqrt(log(2 / 0.1) / (2 * n)))
            total = gaps.table["end"][k] + found["complexity"][k] + found["deviation"][k]
            assert found["bound"][k] == pytest.approx(total)
    surer = single.bounds(lipschitz=2.0, largest=5.0, confidence=0.99)
    assert (surer["bound"] > single.bounds(lipschitz=2.0, largest=5.0)["bound"]).all()


@pytest.mark.parametrize("penalty", [0.0, 0.4])
def test_no_forgetting_between_tasks_with_orthogonal_tangents(penalty):
    phi = [torch.zeros(n, 3 * WIDTH, dtype=DOUBLE) for n in SIZES]
    for k, rows in enumerate(phi):
        rows[:, k * WIDTH : (k + 1) * WIDTH] = features(SIZES[k], WIDTH, decay=0.5, seed=k)
    _, targets = stream()
    gaps = TaskGaps(lazy_tasks(TaskKernels.of_features(phi, bias=False), [-y for y in targets], penalty))
    assert all(not gaps.drift(k).any() for k in range(3))
    assert (gaps.pairs["overlap"] == 0).all()
    assert (gaps.pairs["change"] == 0).all()
    assert (gaps.table["end"] == gaps.table["own"]).all()
    assert gaps.expected([6, 3, 8]).table["interplay"].abs().max() <= 1e-12


def test_the_three_factors_of_every_pair():
    phi, targets = stream()
    kernels = TaskKernels.of_features(phi)
    gaps = TaskGaps(lazy_tasks(kernels, [-y for y in targets], 0.5))
    pairs = gaps.pairs
    assert list(pairs.index) == [(0, 1), (0, 2), (1, 2)]
    for (old, new), row in pairs.iterrows():
        assert (row["samples_old"], row["samples_new"], row["penalty"]) == (SIZES[old], SIZES[new], 0.5)
        weighted = kernel_overlap(*(kernels.matrix(s, t) for s, t in ((old, old), (old, new), (new, new))))
        assert row["overlap"] == pytest.approx(weighted.energy_weighted, rel=1e-12)
        assert 0 < row["overlap"] < 1
        values = torch.linalg.eigvalsh(kernels.matrix(new, new)).clamp_min(0)
        assert row["penalty_share"] == pytest.approx(float((0.5 / (values + 0.5)).mean()), rel=1e-9)
        assert row["step"] == pytest.approx(gaps.tasks[new].step_square ** 0.5)
        assert row["change"] == pytest.approx(float(gaps.tasks[new].change(old).square().sum()) / SIZES[old])
    held = TaskGaps(lazy_tasks(kernels, [-y for y in targets], 1e3)).pairs
    assert (held["change"] < pairs["change"]).all()
    assert (held["penalty_share"] > pairs["penalty_share"]).all()


def test_learning_curve_and_expected_errors_of_a_sequence_agree_on_its_first_task():
    phi, targets = stream()
    gaps = TaskGaps(lazy_tasks(TaskKernels.of_features(phi), [-y for y in targets], 0.5))
    curve = gaps.learning_curve(0, [4, 8])
    for place, n in enumerate((4, 8)):
        expected = gaps.expected([n, 3, 3])
        assert float(expected.errors[1, 0]) == pytest.approx(float(curve.errors[place]), rel=1e-9)
        assert float(expected.training[0]) == pytest.approx(float(curve.training[place]), rel=1e-9)


def test_expected_gaps_of_real_images_against_real_training():
    """Both gaps of three tasks of digits, 120 of 250 samples drawn: ridge in weight space, 30 times."""
    pixels, digits = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    chosen = [torch.nonzero(digits // 4 == k)[:250, 0] for k in range(3)]
    tasks = [(pixels[own] / 16, digits[own]) for own in chosen]
    module = torch.nn.Linear(64, 10, bias=False, dtype=DOUBLE)
    start = module.weight.detach().T
    expected = fc.task_gaps(module, tasks, 10.0, trace=True).expected([120, 120, 120]).table
    draw = torch.Generator().manual_seed(0)
    own, training, ends = [], [], []
    for _ in range(30):
        orders = [torch.randperm(len(x), generator=draw) for x, _ in tasks]
        sets = [(x[order], torch.eye(10).double()[y[order]]) for (x, y), order in zip(tasks, orders, strict=True)]
        weights = trained([x[:120] for x, _ in sets], [y[:120] for _, y in sets], start, 10.0)
        pairs = list(zip(sets, weights[1:], strict=True))
        own.append([(x[120:] @ w - y[120:]).square().sum(1).mean() for (x, y), w in pairs])
        training.append([(x[:120] @ w - y[:120]).square().sum(1).mean() for (x, y), w in pairs])
        ends.append([(x[120:] @ weights[-1] - y[120:]).square().sum(1).mean() for x, y in sets])
    own, training, ends = (torch.tensor(values).mean(0) for values in (own, training, ends))
    assert expected["own"].tolist() == pytest.approx(own.tolist(), rel=0.05)
    assert expected["training"].tolist() == pytest.approx(training.tolist(), rel=0.05)
    assert expected["interplay"].tolist()[:2] == pytest.approx((ends - own).tolist()[:2], rel=0.05)


def good(penalty: float = 0.5):
    phi, targets = stream()
    kernels = TaskKernels.of_features(phi)
    return kernels, lazy_tasks(kernels, [-y for y in targets], penalty)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"penalty": -1.0}, "got penalty=-1.0; expected a finite number of at least 0"),
        ({"penalty": float("nan")}, "got penalty=nan"),
        ({"place": 3}, "got place=3 in a sequence of 3 tasks"),
        ({"residual": torch.ones(4, 3, dtype=DOUBLE)}, r"a residual of shape \(4, 3\) for a kernel \(12, 12\)"),
        ({"residual": torch.full((12, 3), float("inf"), dtype=DOUBLE)}, "residual of task 0 .* holds inf"),
    ],
)
def test_a_task_that_does_not_fit(change, message):
    _, tasks = good()
    with pytest.raises(ValueError, match=message):
        replace(tasks[0], **change)


def test_sequences_that_do_not_fit():
    kernels, tasks = good()
    with pytest.raises(ValueError, match="2 residuals for 3 tasks; expected one for each"):
        lazy_tasks(kernels, [task.residual for task in tasks[:2]], 1.0)
    with pytest.raises(ValueError, match="with one C"):
        lazy_tasks(kernels, [tasks[0].residual, tasks[1].residual[:, 0], tasks[2].residual], 1.0)
    for wrong in (tasks[:2], tasks[::-1], ()):
        with pytest.raises(ValueError, match="in order|over the same samples"):
            TaskGaps(tuple(wrong))
    other = TaskKernels.of_features([features(n, WIDTH, seed=k) for k, n in enumerate((12, 7, 14))])
    with pytest.raises(ValueError, match="over the same samples of all these tasks"):
        TaskGaps((tasks[0], tasks[1], LazyTask(other, 2, randn(14, OUTPUTS), 0.5)))
    for task, after in ((-1, 2), (2, 1), (0, 3)):
        with pytest.raises(ValueError, match="expected 0 <= task <= after < tasks"):
            lazy_drift(tasks, task, after)


def test_points_that_do_not_fit():
    _, tasks = good()
    start, cross = randn(4, OUTPUTS), [randn(4, n) for n in SIZES]
    with pytest.raises(ValueError, match="2 blocks for 3 tasks"):
        lazy_outputs(start, tasks, cross[:2])
    with pytest.raises(ValueError, match=r"a block \(4, 7\) and outputs"):
        lazy_outputs(start, tasks, [cross[1], *cross[1:]])
    with pytest.raises(ValueError, match=r"outputs \(4, 2\)"):
        lazy_outputs(start[:, :2], tasks, cross)
    with pytest.raises(ValueError, match="block of task 1 .* holds nan"):
        lazy_outputs(start, tasks, [cross[0], cross[1] * float("nan"), cross[2]])


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, 95.0, float("nan")])
def test_a_confidence_is_between_0_and_1(confidence):
    with pytest.raises(ValueError, match="expected a number between 0 and 1"):
        TaskGaps(good()[1]).bounds(lipschitz=1.0, largest=1.0, confidence=confidence)


@pytest.mark.parametrize("change", [{"lipschitz": 0.0}, {"largest": -1.0}, {"largest": float("inf")}])
def test_a_loss_has_a_slope_and_a_largest_value(change):
    with pytest.raises(ValueError, match="a finite number above 0"):
        TaskGaps(good()[1]).bounds(**{"lipschitz": 1.0, "largest": 1.0} | change)


def test_no_more_samples_are_drawn_than_there_are():
    gaps = TaskGaps(good()[1])
    with pytest.raises(ValueError, match="12 samples of a pool of 12; expected fewer"):
        gaps.learning_curve(0, 12)
    with pytest.raises(ValueError, match="7 samples of a pool of 7"):
        gaps.expected([4, 7, 4])


def test_the_page():
    page = Path(__file__).parents[2] / "docs" / "gaps.md"
    assert doctest.testfile(str(page), module_relative=False).failed == 0
