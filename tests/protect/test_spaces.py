"""Bases grown from streamed second moments."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from forgetcast.protect.spaces import Basis, Moment, moments_of
from forgetcast.tuners.base import Space, inputs_of


def rows_with(values: list[float], width: int, seed: int = 0) -> Tensor:
    """Rows (n, d) with these singular values."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=draw, dtype=torch.float64)).Q
        for size in (2 * width, width)
    )
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


def grown(rows: Tensor, threshold: float, energy: str = "sigma2", basis: Basis | None = None) -> Basis:
    basis = Basis.empty(1, rows.shape[1]) if basis is None else basis
    return basis.grown(Moment((rows.T @ rows)[None]), threshold, energy)


@pytest.mark.parametrize(
    ("power", "energy", "expected"),
    [
        (0.5, "sigma2", [21, 373, 536, 715]),
        (1.0, "sigma2", [1, 6, 12, 56]),
        (0.5, "sigma4", [1, 6, 12, 56]),
        (1.0, "sigma4", [1, 1, 2, 3]),
    ],
)
def test_the_same_threshold_means_different_things(power, energy, expected):
    """The table of conventions in docs/projection.md: 768 directions with singular values i^-power."""
    values = torch.arange(1, 769, dtype=torch.float64) ** -power
    moment = Moment(torch.diag(values.square())[None])
    found = [Basis.empty(1, 768).grown(moment, threshold, energy).ranks[0] for threshold in (0.5, 0.9, 0.95, 0.99)]
    assert found == expected


@given(st.integers(0, 1000), st.floats(0.3, 0.999))
def test_the_fewest_directions_with_enough_energy(seed, threshold):
    values = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    values = values.sort(descending=True).values
    rows = rows_with(values.tolist(), 9, seed)
    basis = grown(rows, threshold).directions[0]
    held = float((rows @ basis).square().sum() / rows.square().sum())
    fewer = float((rows @ basis[:, :-1]).square().sum() / rows.square().sum())
    assert held >= threshold - 1e-9
    assert fewer < threshold
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-12)


def test_a_second_task_adds_what_the_first_does_not_hold():
    first, second = rows_with([3, 2, 1], 10, 0), rows_with([3, 2], 10, 1)
    basis = grown(second, 1.0, basis=grown(first, 1.0))
    assert basis.ranks == (5,)
    stacked = torch.linalg.qr(torch.cat([first, second]).T @ torch.cat([first, second])).Q[:, :5]
    span = basis.directions[0]
    for rows in (first, second):
        assert torch.allclose(rows @ span @ span.T, rows, atol=1e-10)
    assert torch.linalg.matrix_rank(torch.cat([stacked, span], 1), tol=1e-8) <= 10
    assert torch.equal(span[:, :3], grown(first, 1.0).directions[0])
    assert grown(first, 1.0, basis=basis).ranks == (5,)
    assert grown(first, 0.9, basis=basis).ranks == (5,)


@pytest.mark.parametrize("energy", ["sigma2", "sigma4"])
@given(st.integers(0, 1000), st.floats(0.3, 0.999), st.floats(0.3, 0.999))
def test_a_second_task_adds_the_fewest_directions_with_enough_energy(energy, seed, threshold, before):
    """What the basis holds of the task already counts."""
    draw = torch.Generator().manual_seed(seed)
    first, second = (rows_with((torch.rand(6, generator=draw) + 0.05).tolist(), 9, seed + k) for k in range(2))
    basis = grown(first, before)
    old, span = basis.directions[0], grown(second, threshold, energy, basis).directions[0]
    added = span[:, old.shape[1] :]
    rest = torch.linalg.qr(old, mode="complete").Q[:, old.shape[1] :]

    def held(directions: Tensor) -> float:
        moment = directions.T @ second.T @ second @ directions
        return float(moment.trace() if energy == "sigma2" else moment.square().sum())

    whole = held(old) + held(rest)
    assert torch.equal(span[:, : old.shape[1]], old)
    assert held(old) + held(added) >= (threshold - 1e-9) * whole
    assert not added.shape[1] or held(old) + held(added[:, :-1]) < threshold * whole


def test_directions_a_million_times_weaker_are_held_at_threshold_one():
    rows = rows_with([1, 1e-3, 1e-6], 8)
    basis = grown(rows, 1.0)
    assert basis.ranks == (3,)
    span = basis.directions[0]
    assert float((rows - rows @ span @ span.T).norm()) < 1e-9


def test_streamed_moments_are_those_of_all_rows_and_know_no_order_of_samples():
    layer = nn.Linear(6, 2).double().train()
    space = inputs_of(layer, "layer", 6)
    rows = torch.randn(7, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = moments_of(layer, [space], [rows])[space.name]
    parts = moments_of(layer, [space], rows[torch.randperm(7)].split(2))[space.name]
    flat = rows.reshape(-1, 6)
    assert torch.allclose(whole.total[0], flat.T @ flat)
    assert torch.allclose(parts.total, whole.total)
    first, second = (moments_of(layer, [space], [part])[space.name] for part in rows.split(4))
    assert torch.allclose((first + second).total, whole.total)
    assert layer.training
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 192])
def test_rounding_of_the_rows_is_no_direction(dtype, width):
    """Rows of rank 5 behind two layers that round: 5 directions, and not all."""
    draw = torch.Generator().manual_seed(width)
    layer = nn.Linear(width, 2, bias=False).to(dtype)
    space = inputs_of(layer, "layer", width)
    parts = [torch.randn(*shape, generator=draw).to(dtype) for shape in ((400, 5), (5, width), (width, width))]
    rows = (parts[0] @ parts[1]) if dtype == torch.bfloat16 else parts[0] @ parts[1] @ parts[2]
    moment = moments_of(layer, [space], rows.split(100))[space.name]
    assert Basis.empty(1, width).grown(moment, 1.0).ranks == (5,)
    if dtype == torch.bfloat16:
        assert Basis.empty(1, width).grown(Moment(moment.total), 1.0).ranks == (width,)


def test_of_summed_and_folded_moments_the_coarsest_rounding_counts():
    layer = nn.Linear(6, 2)
    space = inputs_of(layer, "layer", 6)
    single = moments_of(layer, [space], [torch.randn(4, 6)])["layer"]
    double = moments_of(layer.double(), [space], [torch.randn(4, 6, dtype=torch.float64)])["layer"]
    assert (single + double).rounding == (double + single).rounding == torch.finfo(torch.float32).eps
    folded = replace(space, fold=lambda total: 2 * total)
    rows = torch.randn(4, 6)
    found = moments_of(layer.float(), [folded], [rows])["layer"]
    torch.testing.assert_close(found.total[0], 2 * rows.double().T @ rows.double())
    assert found.rounding == torch.finfo(torch.float32).eps


def test_rows_are_those_of_evaluation():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2)).double().train()
    rows = torch.randn(4, 6, dtype=torch.float64)
    found = moments_of(model, [inputs_of(model[1], "layer", 6)], [rows])["layer"]
    torch.testing.assert_close(found.total[0], rows.T @ rows)


@pytest.mark.parametrize("heads", [1, 3])
def test_padding_is_no_row(heads):
    """The moments of padded batches are those of the real tokens, in all heads' copies of them."""
    space = Space("rows", 4, 2, lambda seen: Showing(seen))
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, heads, 5, 4, generator=draw, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])

    def forward(_, batch) -> None:
        for seen in Showing.to:
            seen(batch["rows"])

    batch = {"rows": rows.flatten(2, 3), "attention_mask": mask}
    found = moments_of(nn.Identity(), [space], [batch], forward)[space.name].total
    real = rows.movedim(2, 1)[:, :, mask.bool()].flatten(1, 2)
    torch.testing.assert_close(found, real.mT @ real)
    whole = moments_of(nn.Identity(), [space], [batch], forward, mask=lambda _: None)[space.name].total
    every = rows.flatten(1, 3)
    torch.testing.assert_close(whole, every.mT @ every)
    one_more = {"rows": rows.flatten(2, 3), "attention_mask": mask[:, :4]}  # of other tokens: nothing is left out
    torch.testing.assert_close(moments_of(nn.Identity(), [space], [one_more], forward)[space.name].total, whole)


class Showing:
    """Gives the function what the forward pass of a test shows."""

    to: ClassVar[list] = []

    def __init__(self, seen) -> None:
        self.seen = seen

    def __enter__(self) -> None:
        self.to.append(self.seen)

    def __exit__(self, *_: object) -> None:
        self.to.remove(self.seen)


@pytest.mark.usefixtures("unchecked_types")
def test_moments_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"moments of shape \(1, 5, 5\); expected \(1, 6, 6\)"):
        Basis.empty(1, 6).grown(Moment(torch.eye(5)[None]), 0.9)
    with pytest.raises(ValueError, match="energy="):
        Basis.empty(1, 5).grown(Moment(torch.eye(5)[None]), 0.9, "sigma3")
