"""The probes of a task and the leading modes of their tangent kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetcast.methods.base import Batch, TaskData
from forgetcast.protect.vulnerable import balanced_probes, tangent_of, tangent_of_later, vulnerable_modes
from forgetcast.tangent.operator import TangentOperator
from forgetcast.tangent.products import TangentMatrix
from protect.models import jacobian, small_model, small_task


def task_with(labels, index=0, batch=4):
    y = torch.tensor(labels, dtype=torch.int64)
    x = torch.arange(len(y)).double()[:, None]  # a sample is its own place
    rows = torch.arange(len(y)).split(batch)
    return TaskData(index, (0,), (0,), lambda: (Batch(x[r], y[r], r) for r in rows))


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 50), st.integers(0, 3))
def test_probes_are_balanced_over_labels(labels, count, seed):
    places = balanced_probes(task_with(labels), count, seed)[:, 0].long()
    assert len(places.unique()) == len(places) == min(count, len(labels))
    there = torch.bincount(torch.tensor(labels), minlength=5)
    taken = torch.bincount(torch.tensor(labels)[places], minlength=5)
    short = taken < there  # of these there were more to take
    assert not short.any() or taken.max() <= taken[short].min() + 1


def test_probes_are_a_function_of_seed_and_task():
    labels = [0, 1] * 50
    first = balanced_probes(task_with(labels), 10, seed=3)
    assert torch.equal(first, balanced_probes(task_with(labels, batch=7), 10, seed=3))
    assert not torch.equal(first, balanced_probes(task_with(labels), 10, seed=4))
    assert not torch.equal(first, balanced_probes(task_with(labels, index=1), 10, seed=3))
    with pytest.raises(ValueError, match="a task without samples; expected at least one"):
        balanced_probes(task_with([]), 3)


@pytest.mark.parametrize("outputs", [(0, 1, 2), (0, 2)])
@pytest.mark.parametrize(("memory", "kind", "tolerance"), [(2**28, TangentMatrix, 1e-9), (0, TangentOperator, 1e-4)])
def test_modes_are_the_leading_singular_vectors_of_the_jacobian(outputs, memory, kind, tolerance):
    model = small_model()
    whole, _ = small_task()
    J = jacobian(model, whole.inputs)[:, outputs].flatten(0, 1)
    tangent = tangent_of(model, whole.inputs, outputs, memory=memory)
    assert isinstance(tangent, kind)
    left, values, _ = torch.linalg.svd(J, full_matrices=False)
    k = int((values[:-1] / values[1:])[:10].argmax()) + 1  # where the gap is widest
    modes = vulnerable_modes(tangent, k).flatten(1)
    torch.testing.assert_close(modes @ modes.T, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(modes.T @ modes, left[:, :k] @ left[:, :k].T, atol=tolerance, rtol=0)
    torch.testing.assert_close(tangent.transpose(modes.view(k, -1, len(outputs))), modes @ J, atol=1e-9, rtol=0)


def test_an_output_to_come_is_moved_by_its_own_row_alone():
    model = small_model()
    whole, _ = small_task()
    model.head.grow(4)
    model.double()
    J = jacobian(model, whole.inputs)[:, 3]
    features = tangent_of_later(model, whole.inputs).matrix
    torch.testing.assert_close(J @ J.T, features @ features.T)


def test_an_eigensolver_that_stops_short_says_so(monkeypatch):
    from forgetcast.protect import vulnerable as module

    solver = module.leading_modes
    monkeypatch.setattr(module, "leading_modes", lambda *given, **named: solver(*given, **named, most=2))
    model = small_model()
    whole, _ = small_task()
    tangent = tangent_of(model, whole.inputs, (0, 1, 2), memory=0)
    with pytest.warns(UserWarning, match="products the 2 modes have residuals up to"):
        vulnerable_modes(tangent, 2)
