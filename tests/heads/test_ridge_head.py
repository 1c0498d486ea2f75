"""Streamed ridge against dense normal equations, and its penalty against one chosen on stored samples."""

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from builders import features, labels
from forgetcast.heads.ridge import RecursiveRidge

WIDTH, OUTPUTS, ROWS = 24, 6, 200


def joint(phi, y, penalty):
    phi = phi.double()
    return torch.linalg.solve(
        phi.T @ phi + penalty * torch.eye(phi.shape[1], dtype=phi.dtype), phi.T @ one_hot(y, OUTPUTS).double()
    ).T


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("penalty", [1e-2, 10.0])
def test_any_order_of_tasks_and_batches_gives_joint_ridge(decay, dtype, penalty):
    phi, y = features(ROWS, WIDTH, decay=decay, dtype=dtype), labels(ROWS, 0, OUTPUTS)
    expected = joint(phi, y, penalty)
    generator = torch.Generator().manual_seed(3)
    by_class = y.argsort(stable=True)
    for order, size in ((by_class, 7), (by_class.flip(0), ROWS), (torch.randperm(ROWS, generator=generator), 31)):
        head = RecursiveRidge(WIDTH, penalty=penalty)
        for rows in order.split(size):
            head.grow(int(y[rows].max()) + 1)
            head.observe(phi[rows], y[rows])
            head.solve()
        head.grow(OUTPUTS)
        assert (head.weight - expected).norm() <= 1e-8 * expected.norm()


def chosen_on_samples(phi, y, grid, held_every):
    seen, held = dict.fromkeys(range(OUTPUTS), 0), []
    for label in y.tolist():
        held.append(seen[label] % held_every == 1)
        seen[label] += 1
    held = torch.tensor(held)
    errors = []
    for penalty in grid:
        gap = phi[held] @ joint(phi[~held], y[~held], penalty).T - one_hot(y[held], OUTPUTS)
        errors.append(float(gap.square().sum(1).mean()))
    return errors


@pytest.mark.parametrize("held_every", [2, 5])
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_the_penalty_is_the_one_that_stored_samples_would_choose(held_every, noise):
    y = labels(ROWS, 0, OUTPUTS)
    phi = features(ROWS, WIDTH, decay=0.5) + (3 - noise) * one_hot(y, WIDTH)
    grid = (1e-3, 1e-1, 1e1, 1e3)
    expected = chosen_on_samples(phi, y, grid, held_every)
    for size in (1, 13, ROWS):
        head = RecursiveRidge(WIDTH, OUTPUTS, penalty=grid, held_every=held_every)
        for rows in torch.arange(ROWS).split(size):
            head.observe(phi[rows], y[rows])
        head.solve()
        assert head.errors.tolist() == pytest.approx(expected, rel=1e-9)
        assert float(head.penalty) == grid[int(np.argmin(expected))]
        final = joint(phi, y, float(head.penalty))
        assert (head.weight - final).norm() <= 1e-8 * final.norm()


def test_the_choice_follows_the_data():
    """Labels without relation to the features want the strongest penalty, labels that are the features the weakest."""
    y, grid = labels(ROWS, 0, OUTPUTS), (1e-4, 1e6)
    for phi, best in ((features(ROWS, WIDTH, decay=0.0), 1e6), (one_hot(y, WIDTH).double(), 1e-4)):
        head = RecursiveRidge(WIDTH, OUTPUTS, penalty=grid)
        head.observe(phi, y)
        head.solve()
        assert float(head.penalty) == best


def test_a_singular_system_is_refused_and_skipped_in_a_grid():
    phi, y = features(WIDTH // 2, WIDTH, decay=0.0), labels(WIDTH // 2, 0, 3)
    head = RecursiveRidge(WIDTH, 3, penalty=0.0)
    head.observe(phi, y)
    with pytest.raises(ValueError, match=r"12 samples of width 24 plus penalty 0 is singular.*Raise the penalty"):
        head.solve()
    head = RecursiveRidge(WIDTH, 3, penalty=(0.0, 1.0))
    head.observe(phi, y)
    head.solve()
    assert head.errors[0] == torch.inf
    assert float(head.penalty) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"penalty": (1.0, float("nan"))}, "penalty=nan"),
        ({"penalty": ()}, r"penalty=\(\)"),
        ({"held_every": 1}, "held_every=1"),
        ({"outputs": -1}, "outputs=-1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecursiveRidge(WIDTH, **arguments)


def test_a_grid_needs_a_class_of_two_samples():
    head = RecursiveRidge(WIDTH, 3, penalty=(0.1, 1.0))
    head.observe(features(3, WIDTH), torch.arange(3))
    with pytest.raises(ValueError, match=r"no class has two samples.*Give one penalty"):
        head.solve()
