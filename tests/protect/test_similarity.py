"""Cosines of the gradients of two tasks: a dense oracle, a common point, nothing disturbed."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from forgetcast.forecast.network.modules import modules_of
from forgetcast.forecast.network.placed import place_rows
from forgetcast.heads.linear import Linear
from forgetcast.methods.base import Batch, Model, TaskData
from forgetcast.protect.similarity import (
    cosines,
    drawn,
    fitted_rows,
    point_of,
    probe_error,
    sketched,
    standing_at,
    task_gradient,
)
from forgetcast.streams.sources import Source, digits


@cache
def source_of_digits() -> Source:
    return digits()


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 5)]
    made = Model(nn.Sequential(*layers), Linear(5))
    with torch.no_grad():
        made.backbone[1].running_mean.normal_()
    return made


def samples(classes: tuple[int, ...] = (4, 2, 7), n: int = 30, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes).repeat(n)[:n]
    return torch.randn(n, 6, generator=draw) + labels[:, None] / 4, labels


def modules(net: Model):
    return modules_of(name for name, _ in net.backbone.named_parameters())


@pytest.mark.parametrize("batch_size", [7, 64])
def test_gradients_against_autograd_on_all_samples_at_once(batch_size):
    net = model()
    inputs, labels = samples()
    found = task_gradient(net, inputs, labels, modules(net), batch_size=batch_size)
    net.eval()
    classes, places = labels.unique(return_inverse=True)
    head = nn.Linear(5, 3)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        phi = net.features(inputs)
    place_rows(head, phi, places, range(3), iterations=50, ridge=1e-2)
    parameters = list(net.backbone.parameters())
    dense = torch.autograd.grad(cross_entropy(head(net.features(inputs)), places), parameters)
    assert list(found) == ["0", "1", "4"]
    assert torch.allclose(torch.cat(list(found.values())), torch.cat([part.flatten() for part in dense]), atol=1e-6)
    signs = task_gradient(net, inputs, labels, modules(net), metric="signs")
    assert torch.equal(signs["4"], task_gradient(net, inputs, labels, modules(net))["4"].sign())


def test_joint_rows_are_those_fitted_to_both_tasks_and_the_loss_is_over_the_classes_of_one():
    net = model()
    first, second = samples((4, 2, 7)), samples((3, 7, 4), seed=2)
    rows = fitted_rows(net, first, second, batch_size=7)
    found = task_gradient(net, *second, modules(net), rows=rows)
    net.eval()
    head = nn.Linear(5, 4)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    inputs, labels = (torch.cat(pair) for pair in zip(first, second, strict=True))
    place_rows(head, net.features(inputs).detach(), torch.searchsorted(torch.tensor([2, 3, 4, 7]), labels), range(4),
               iterations=50, ridge=1e-2)  # fmt: skip
    logits = head(net.features(second[0]))[:, 1:]
    loss = cross_entropy(logits, torch.searchsorted(torch.tensor([3, 4, 7]), second[1]))
    dense = torch.autograd.grad(loss, list(net.backbone.parameters()))
    asked, truth = torch.cat(list(found.values())), torch.cat([part.flatten() for part in dense])
    assert (asked - truth).norm() < 0.05 * truth.norm()  # where a fit in float32 ends hangs on the machine's rounding
    alone = torch.cat(list(task_gradient(net, *second, modules(net)).values()))
    assert (alone - truth).norm() > 0.3 * truth.norm()


@pytest.mark.parametrize("seed", range(6))
def test_with_joint_rows_shared_classes_make_tasks_more_alike(seed):
    """Two tasks of four digits out of eight, with none or two in common, other samples in each."""
    source = source_of_digits()
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = Model(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)), Linear(5))
    inputs, labels = torch.as_tensor(source.inputs).float().flatten(1), torch.as_tensor(source.labels)
    half = torch.rand(len(labels), generator=draw) < 0.5
    order = torch.randperm(10, generator=draw)

    def part(which: slice, side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = torch.isin(labels, order[which]) & side
        return inputs[kept], labels[kept]

    def alike(second: slice) -> float:
        tasks = part(slice(0, 4), half), part(second, ~half)
        rows = fitted_rows(net, *tasks)
        found = cosines(*(task_gradient(net, *one, modules(net), rows=rows) for one in tasks))[1]
        assert found is not None
        return found

    assert alike(slice(2, 6)) > alike(slice(4, 8)) + 0.05


def test_labels_without_rows_are_refused():
    net = model()
    rows = fitted_rows(net, samples((4, 2)))
    with pytest.raises(ValueError, match=r"labels \[7\] with rows of \[2, 4\]"):
        task_gradient(net, *samples((4, 7)), modules(net), rows=rows)


def test_preconditioned_gradients_are_means_over_root_mean_squares():
    net = model()
    inputs, labels = samples(n=24)
    parts = []
    found = task_gradient(net, inputs, labels, modules(net), batch_size=8, metric="preconditioned")
    net.eval()
    head = nn.Linear(5, 3)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    places = labels.unique(return_inverse=True)[1]
    place_rows(head, net.features(inputs).detach(), places, range(3), iterations=50, ridge=1e-2)
    for start in (0, 8, 16):
        loss = cross_entropy(head(net.features(inputs[start : start + 8])), places[start : start + 8])
        parts.append(torch.autograd.grad(loss, net.backbone[4].weight)[0].flatten())
    stacked = torch.stack(parts).double()
    expected = stacked.mean(0) / (stacked.square().mean(0).sqrt() + 1e-8)
    assert torch.allclose(found["4"][: len(expected)].double(), expected, rtol=1e-3, atol=1e-4)


def test_nothing_is_disturbed():
    net = model().train()
    net.backbone[4].requires_grad_(False)
    net.backbone[4].eval()
    net.backbone[0].weight.grad = torch.ones_like(net.backbone[0].weight)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    inputs, labels = samples()
    point = {name: torch.zeros_like(value) for name, value in point_of(net.backbone).items()}

    def interrupted() -> None:
        with standing_at(net.backbone, point):
            assert not any(bool(value.any()) for value in net.backbone[0].parameters())
            task_gradient(net, inputs, labels, modules(net))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        interrupted()
    probe_error(net, inputs, labels)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [parameter.requires_grad for parameter in net.backbone.parameters()] == [True] * 4 + [False] * 2
    assert [module.training for module in net.backbone] == [True, True, True, True, False]
    assert bool((net.backbone[0].weight.grad == 1).all())
    assert all(value.grad is None for name, value in net.named_parameters() if name != "backbone.0.weight")


def test_gradients_at_a_point_do_not_depend_on_where_the_model_has_gone():
    net = model()
    inputs, labels = samples()
    point = point_of(net.backbone)
    assert "1.running_mean" in point
    there = task_gradient(net, inputs, labels, modules(net))
    with torch.no_grad():
        for value in (*net.backbone.parameters(), net.backbone[1].running_mean):
            value.add_(torch.randn_like(value))
    assert not torch.equal(task_gradient(net, inputs, labels, modules(net))["0"], there["0"])
    with standing_at(net.backbone, point):
        again = task_gradient(net, inputs, labels, modules(net))
    assert all(torch.equal(again[name], part) for name, part in there.items())


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_cosines_do_not_depend_on_sizes(one, other, seed):
    draw = torch.Generator().manual_seed(seed)
    first, second = ({name: torch.randn(9, generator=draw) for name in "ab"} for _ in range(2))
    by_module, whole = cosines(first, second)
    scaled, scaled_whole = cosines(
        {name: one * part for name, part in first.items()}, {name: other * part for name, part in second.items()}
    )
    assert scaled == pytest.approx(by_module, abs=1e-5)
    assert scaled_whole == pytest.approx(whole, abs=1e-5)
    parts = torch.cat(list(first.values())), torch.cat(list(second.values()))
    assert whole == pytest.approx(torch.nn.functional.cosine_similarity(*parts, dim=0).item(), abs=1e-5)


def test_cosines_where_there_is_nothing_to_compare():
    zero, one = torch.zeros(3), torch.ones(3)
    assert cosines({"a": zero}, {"a": one}) == ({}, None)
    assert cosines({"a": one}, {}) == ({}, None)
    by_module, whole = cosines({"a": one, "b": zero}, {"a": one, "b": one})
    assert by_module == {"a": pytest.approx(1), "b": 0.0}
    assert whole == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("seed", range(5))
def test_a_sketch_keeps_cosines(seed):
    draw = torch.Generator().manual_seed(seed)
    first = torch.randn(50_000, generator=draw)
    second = 0.5 * first + torch.randn(50_000, generator=draw)
    exact = cosines({"m": first}, {"m": second})[1]
    kept = cosines({"m": sketched(first, 4096, "m")}, {"m": sketched(second, 4096, "m")})[1]
    assert kept == pytest.approx(exact, abs=0.05)
    assert len(sketched(first, 4096, "m")) == 4096
    assert torch.equal(sketched(first[:100], 4096, "m"), first[:100])


def task(inputs, labels, batch_size: int = 7) -> TaskData:
    def batches():
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            yield Batch(inputs[part], labels[part], torch.arange(len(labels))[part])

    classes = tuple(labels.unique().tolist())
    return TaskData(0, classes, classes, batches)


def test_samples_are_drawn_evenly_from_classes_that_lie_together():
    labels = torch.arange(3).repeat_interleave(20)
    inputs = torch.arange(60.0)[:, None]
    found, own = drawn(task(inputs, labels), 12)
    assert torch.equal(torch.bincount(own), torch.tensor([4, 4, 4]))
    assert torch.equal(labels[found[:, 0].long()], own)
    whole, all_labels = drawn(task(inputs, labels), 100)
    assert torch.equal(whole, inputs)
    assert torch.equal(all_labels, labels)


def test_probe_error_is_that_of_rows_fitted_on_half_and_asked_of_the_others():
    net = Model(nn.Identity(), Linear(6))
    net.backbone = nn.Linear(6, 6)
    nn.init.eye_(net.backbone.weight)
    nn.init.zeros_(net.backbone.bias)
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(80)
    apart = 8 * torch.eye(6)[labels] + torch.randn(240, 6, generator=draw)
    assert probe_error(net, apart, labels) == (0.0, pytest.approx(2 / 3))
    error, chance = probe_error(net, torch.randn(240, 6, generator=draw), labels)
    assert abs(error - chance) < 0.2
    assert probe_error(net, apart[:4], torch.zeros(4, dtype=torch.int64)) == (0.0, 0.0)


def test_a_task_of_one_class_asks_nothing():
    net = model()
    inputs, _ = samples()
    found = task_gradient(net, inputs, torch.full((len(inputs),), 3), modules(net))
    assert not any(bool(part.any()) for part in found.values())


def test_features_that_are_not_finite_are_refused():
    net = model()
    inputs, labels = samples()
    inputs[3, 2] = float("nan")
    for refused in (lambda: task_gradient(net, inputs, labels, modules(net)), lambda: probe_error(net, inputs, labels)):
        with pytest.raises(ValueError, match="features"):
            refused()
