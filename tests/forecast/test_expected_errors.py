"""Expected errors of a sequence of tasks against sequences really trained, and against what must be."""

import pytest
import torch

from builders import DOUBLE
from forgetcast.forecast.expected import Population, expected_errors, populations
from forgetcast.forecast.learning_curve import TargetSpectrum, learning_curve
from forgetcast.tangent.blocks import TaskKernels

WIDTH, OUTPUTS = 100, 20


def tasks_of(decay: float, seed: int):
    """Three tasks: spectra of one decay in other orders and along other directions, targets alike."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.arange(1, WIDTH + 1, dtype=DOUBLE) ** -decay
    turned = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw, dtype=DOUBLE)).Q
    mixed = values[torch.randperm(WIDTH, generator=draw)]
    moments = [torch.diag(values), torch.diag(mixed), (turned * values) @ turned.T]
    first = torch.randn(WIDTH, OUTPUTS, generator=draw, dtype=DOUBLE)
    shift = torch.randn(3, WIDTH, OUTPUTS, generator=draw, dtype=DOUBLE)
    return [Population(m, first + 0.5 * step) for m, step in zip(moments, shift, strict=True)]


def ridge(theta, phi, y, penalty):
    """Weights after a task, for many draws at once."""
    held = phi.mT @ phi + penalty * torch.eye(phi.shape[2], dtype=DOUBLE)
    return theta + torch.cholesky_solve(phi.mT @ (y - phi @ theta), torch.linalg.cholesky(held))


def simulated(tasks, samples, penalty, noise, draws, seed):
    """Mean errors, row k on every task after task k, and on the training samples."""
    draw = torch.Generator().manual_seed(seed)
    theta = torch.zeros(draws, WIDTH, OUTPUTS, dtype=DOUBLE)
    errors, training = [], []
    for task, n in zip(tasks, samples, strict=True):
        root = torch.linalg.cholesky(task.moments)
        phi = torch.randn(draws, n, WIDTH, generator=draw, dtype=DOUBLE) @ root.T
        y = phi @ task.target + noise * torch.randn(draws, n, OUTPUTS, generator=draw, dtype=DOUBLE)
        theta = ridge(theta, phi, y, penalty)
        away = [theta - other.target for other in tasks]
        errors.append([(a * (t.moments @ a)).sum((1, 2)).mean() for a, t in zip(away, tasks, strict=True)])
        training.append((phi @ theta - y).square().sum((1, 2)).mean() / n)
    return torch.tensor(errors), torch.tensor(training)


@pytest.mark.parametrize(("penalty", "noise"), [(0.05, 0.0), (0.05, 0.3), (1.0, 0.3)])
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_within_five_per_cent_of_simulation(decay, penalty, noise):
    for seed in range(2):
        tasks, samples = tasks_of(decay, seed), (40, 300, 60)
        found = expected_errors(tasks, samples, penalty, noise=noise)
        errors, training = simulated(tasks, samples, penalty, noise, 40, seed)
        assert found.errors[1:].flatten().tolist() == pytest.approx(errors.flatten().tolist(), rel=0.05)
        own = errors.diagonal()
        # of task 1 most of the error at the end is forgetting; of task 0 it is a difference of like numbers
        assert found.table["interplay"][1] == pytest.approx(float(errors[-1, 1] - own[1]), rel=0.05)
        assert found.training.tolist() == pytest.approx(training.tolist(), rel=0.05)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
@pytest.mark.parametrize("samples", [(40, 60, 20), (100, 70, 120)])
def test_draws_from_pools_within_five_per_cent_of_simulation(samples, penalty):
    """On the samples of each pool that were not drawn, of which the drawn ones are part of the pool's mean."""
    pool, width, draws = 150, 200, 40
    draw = torch.Generator().manual_seed(3)
    values = torch.arange(1, width + 1, dtype=DOUBLE) ** -0.5
    scales = [values, values.flip(0), values * (torch.arange(width) % 4 == 0)]
    phi = [torch.randn(pool, width, generator=draw, dtype=DOUBLE) * scale for scale in scales]
    target = torch.randn(width, OUTPUTS, generator=draw, dtype=DOUBLE)
    y = [rows @ target + 2 * torch.randn(pool, OUTPUTS, generator=draw, dtype=DOUBLE) for rows in phi]
    found = expected_errors(populations(TaskKernels.of_features(phi, bias=False), y), samples, penalty)
    orders = [torch.rand(draws, pool, generator=draw).argsort(1) for _ in phi]
    theta = torch.zeros(draws, width, OUTPUTS, dtype=DOUBLE)
    for k, n in enumerate(samples):
        drawn = orders[k][:, :n]
        gram = phi[k] @ phi[k].T
        held = gram[drawn[:, :, None], drawn[:, None]] + penalty * torch.eye(n, dtype=DOUBLE)
        inverse = torch.linalg.pinv(held, hermitian=True, rtol=1e-12)
        theta = theta + phi[k][drawn].mT @ inverse @ (y[k][drawn] - phi[k][drawn] @ theta)
        for t, m in enumerate(samples):
            rest = orders[t][:, m:]
            error = (phi[t][rest] @ theta - y[t][rest]).square().sum(2).mean()
            assert float(found.errors[k + 1, t]) == pytest.approx(float(error), rel=0.05)


def test_the_first_task_is_a_learning_curve():
    values = torch.arange(1, WIDTH + 1, dtype=DOUBLE) ** -1.0
    theta = torch.randn(WIDTH, OUTPUTS, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    spectrum = TargetSpectrum(values, values.sqrt()[:, None] * theta)
    for penalty, noise, n in ((0.0, 0.3, 20), (0.1, 0.0, 20), (0.1, 0.3, 200), (0.0, 0.3, 200)):
        curve = learning_curve(spectrum, n, penalty, noise=noise)
        found = expected_errors([Population(torch.diag(values), theta)], [n], penalty, noise=noise)
        assert float(found.errors[1, 0]) == pytest.approx(float(curve.errors), rel=1e-9)
        assert float(found.training[0]) == pytest.approx(float(curve.training), rel=1e-9, abs=1e-15)


def test_tasks_that_share_no_feature_leave_each_other_alone():
    half = torch.ones(WIDTH, dtype=DOUBLE)
    half[WIDTH // 2 :] = 0
    theta = torch.randn(WIDTH, OUTPUTS, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    tasks = [Population(torch.diag(part), theta) for part in (half, 1 - half)]
    for penalty in (0.0, 0.5):
        found = expected_errors(tasks, [20, 25], penalty, noise=0.1)
        assert float(found.errors[2, 0]) == pytest.approx(float(found.errors[1, 0]), rel=1e-12)
        assert float(found.errors[1, 1]) == pytest.approx(float(found.errors[0, 1]), rel=1e-12)
        assert found.table["interplay"].abs().max() <= 1e-12


def test_the_factors_drive_the_interplay_gap():
    """More overlap of features forgets more; a larger penalty on the second task's way less; equal tasks help."""
    values = torch.arange(1, WIDTH + 1, dtype=DOUBLE) ** -1.0
    draw = torch.Generator().manual_seed(0)
    theta, other = (torch.randn(WIDTH, 1, generator=draw, dtype=DOUBLE) for _ in range(2))
    first = Population(torch.diag(values), theta)
    gaps = []
    for overlap in (0.0, 0.3, 1.0):
        shared = values * overlap + values.flip(0) * (1 - overlap)
        gaps.append(
            expected_errors([first, Population(torch.diag(shared), other)], [40, 40], 0.1).table["interplay"][0]
        )
    assert gaps[0] < gaps[1] < gaps[2]
    again = expected_errors([first, first, first], [40, 40, 40], 0.1).errors[:, 0]
    assert (again.diff() < 0).all()


def test_table():
    tasks = tasks_of(1.0, 0)
    found = expected_errors(tasks, [20, 30, 40], 0.1)
    table = found.table
    assert table["samples"].tolist() == [20, 30, 40]
    assert table["own"].tolist() == [float(found.errors[k + 1, k]) for k in range(3)]
    assert (table["specific"] == table["own"] - table["training"]).all()
    assert (table["interplay"] == table["end"] - table["own"]).all()
    assert table["interplay"][2] == 0
    assert found.errors[0].tolist() == pytest.approx(
        [float((task.target * (task.moments @ task.target)).sum()) for task in tasks]
    )


def test_bad_input():
    square, theta = torch.eye(4, dtype=DOUBLE), torch.ones(4, 1, dtype=DOUBLE)
    task = Population(square, theta)
    with pytest.raises(ValueError, match=r"moments \(4, 4\) and a target \(3, 1\)"):
        Population(square, theta[:3])
    with pytest.raises(ValueError, match="moments .* holds nan"):
        Population(square * float("nan"), theta)
    with pytest.raises(ValueError, match="not symmetric"):
        Population(square + torch.ones(4, 4).double().triu(1), theta)
    with pytest.raises(ValueError, match="unlearnable=-1.0"):
        Population(square, theta, -1.0)
    with pytest.raises(ValueError, match="2 sample numbers for 1 tasks"):
        expected_errors([task], [3, 3], 1.0)
    with pytest.raises(ValueError, match="0 sample numbers for 0 tasks"):
        expected_errors([], [], 1.0)
    with pytest.raises(ValueError, match="all in one feature space"):
        expected_errors([task, Population(square[:3, :3], theta[:3])], [3, 3], 1.0)
    with pytest.raises(ValueError, match="samples=0"):
        expected_errors([task], [0], 1.0)
    with pytest.raises(ValueError, match="penalty=-1.0"):
        expected_errors([task], [3], -1.0)
    with pytest.raises(ValueError, match="The expected error is infinite here"):
        expected_errors([task], [4], 0.0, noise=0.1)
    with pytest.raises(ValueError, match="noise=0.1 beside a pool"):
        expected_errors([Population(square, theta, pool=9)], [4], 1.0, noise=0.1)
    kernels = TaskKernels(((square,),))
    with pytest.raises(ValueError, match=r"targets of \[3\] samples"):
        populations(kernels, [torch.ones(3, 1)])
    with pytest.raises(ValueError, match="the full kernel of several outputs"):
        populations(TaskKernels(((square.view(2, 2, 2, 2),),)), [torch.ones(2, 2)])
