"""The head's own training on features at hand: exact where the body stands still, and the run's own order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_memory_of_a_run import near_some_point
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import forgetcast as fc
from builders import DOUBLE, relative_error
from forgetcast.forecast.network.stock import Stock, stock
from forgetcast.forecast.network.surrogate import Objective
from forgetcast.forecast.network.window import window

OLD, NEW = (0, 1), (2, 3, 4)


class Still(nn.Module):
    """A body whose parameters train and change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.dead = nn.Linear(12, 10).requires_grad_(False), nn.Parameter(torch.ones(10))
        self.head = nn.Linear(10, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(inputs)) + 0 * self.dead)


def task(seed: int, count: int = 120) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 12, generator=generator, dtype=DOUBLE)

    def of(labels: Tensor) -> tuple[Tensor, Tensor]:
        return centres[labels] + torch.randn(len(labels), 12, generator=generator, dtype=DOUBLE), labels

    return of(torch.arange(40) % 2), of(2 + torch.arange(count) % 3)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "training",
    [
        fc.AdamW(learning_rate=0.01, steps=30, batch_size=16, classes=NEW, seed=5),
        fc.AdamW(learning_rate=0.01, steps=30, batch_size=16, classes=NEW, max_gradient_norm=0.1, weight_decay=0.1),
        fc.SGD(learning_rate=0.1, steps=30, batch_size=16, momentum=0.9, reduction="sum", seed=2),
        fc.GradientDescent(learning_rate=0.5, steps=30, loss="cross_entropy"),
    ],
    ids=["AdamW", "AdamW, clipped", "SGD, summed", "full batches"],
)
def test_where_the_body_stands_still_the_forecast_is_the_run(training):
    torch.manual_seed(0)
    model = Still().double()
    old, new = task(0)
    seen = fc.forecast(model, old, new, training, estimator="anchored", budget=0.4, head="placed")
    model.head.load_state_dict({"weight": seen.start.weight, "bias": seen.start.bias})
    run = fc.forecast(model, old, new, training, estimator="anchored", budget=1.0)
    assert relative_error(seen.logits, run.logits) < 1e-10
    assert float(run.drift.norm()) > 0.01


@given(st.integers(0, 1000), st.integers(1, 8))
def test_classes_move_as_their_samples_at_anchors_do(seed, classes):
    near, theta, _, _ = near_some_point(seed)
    held = window(near, None)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(9, near.features.shape[1], generator=generator, dtype=DOUBLE)
    labels = torch.arange(9) % (classes + 1)
    own = stock(features, Objective(near.objective.training, labels, 9), whole=True)
    moved = held.moved(theta)
    found = own.shifts(held, moved)
    motion = moved - features[near.places]
    for label in range(classes + 1):
        mine = labels[near.places] == label
        expected = motion[mine].mean(0) if bool(mine.any()) else motion.mean(0)
        assert torch.allclose(found[label], expected)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=DOUBLE).requires_grad_() for shape in ((9, 5), (9,)))
    logits = (features + found[labels]) @ weight.T + bias
    losses = cross_entropy(logits, labels, reduction="none")
    parts = [torch.autograd.grad(loss, (weight, bias), retain_graph=True) for loss in losses]
    slopes = own.slopes(held, moved, weight.detach(), bias.detach(), own.turn(torch.arange(9)))
    for slope, gradients in zip(slopes, zip(*parts, strict=True), strict=True):
        rows = torch.stack(gradients)
        assert torch.allclose(slope.mean, rows.mean(0))
        assert torch.allclose(slope.second, rows.square().mean(0))


@pytest.mark.usefixtures("unchecked_types")
def test_the_order_of_the_run_is_known():
    torch.manual_seed(0)
    model = Still().double()
    old, new = task(0)

    def drift(seed: int, budget: float) -> Tensor:
        training = fc.AdamW(learning_rate=0.01, steps=30, batch_size=16, classes=NEW, seed=seed)
        return fc.forecast(model, old, new, training, estimator="anchored", budget=budget, head="placed").drift

    assert relative_error(drift(0, 0.4), drift(0, 1.0)) < 1e-10
    assert relative_error(drift(0, 0.4), drift(1, 1.0)) > 1e-3


def test_the_halves_of_a_forecast_share_no_samples_of_the_head(monkeypatch):
    """Where only some losses could be read: of these each half has its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 5)).double()
    old, new = task(0, 600)
    training = fc.AdamW(learning_rate=2e-3, steps=60, batch_size=16, classes=(*OLD, *NEW))
    taken, slopes = [], Stock.slopes

    def counted(self: Stock, *given: object) -> object:
        taken.append(set(given[4].taken.tolist()))
        return slopes(self, *given)

    monkeypatch.setattr(Stock, "slopes", counted)
    fc.forecast(model, old, new, training, budget=0.15)
    assert len(taken) == 5 * 60  # the path and those that tell which share of it is believed, then the two halves
    whole, first, second = (set().union(*taken[start:end]) for start, end in ((0, 180), (180, 240), (240, 300)))
    assert len(whole) < 600
    assert first | second == whole
    assert not first & second


def fresh() -> tuple[nn.Sequential, Tensor, tuple[Tensor, Tensor]]:
    """A network whose new rows are equal, and a task that it learns in the direction of its classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 5)).double()
    with torch.no_grad():
        model[2].weight[2:], model[2].bias[2:] = 0, 0
    old, new = task(0, 400)
    return model, old[0], new


def test_a_fresh_head_is_followed_one_anchor_at_a_time():
    """Losses say nothing of the samples at the start: none is read for it; of the body's motion a part is told."""
    model, old, (inputs, labels) = fresh()
    training = fc.AdamW(learning_rate=2e-3, steps=60, batch_size=32, classes=NEW)
    shares = []
    for noise in (0.0, 0.5, 0.6, 0.7, 0.8, 0.9):
        new = inputs, torch.where(torch.rand(400) < noise, labels[torch.randperm(400)], labels)
        found = fc.forecast(model, old, new, training, budget=0.3)
        assert found.trust.degenerate
        assert found.batching.few
        assert found._stock is None
        assert set(found._windows) == {1}
        assert torch.equal(found.what_if().end.theta, found.end.theta)
        again = found.what_if(learning_rate=1e-3, steps=120).what_if(learning_rate=2e-3, steps=60)
        assert torch.allclose(again.end.theta, found.end.theta, rtol=1e-9)
        shares.append(found._shares[-1])
    assert shares[0] > shares[-1]
    assert any(0 < share < 1 for share in shares)
    placed = fc.forecast(model, old, (inputs, labels), training, budget=0.3, head="placed")
    assert not placed.batching.few
    assert max(placed._windows) > 1


def test_the_larger_the_anchors_the_fewer_are_in_use_together():
    """No more than 64 samples: with more of them the oldest lag behind the path."""
    model, old, (inputs, labels) = fresh()
    new = inputs, torch.where(torch.rand(400) < 0.9, labels[torch.randperm(400)], labels)
    training = fc.AdamW(learning_rate=2e-3, steps=60, batch_size=32, classes=NEW)
    most = []
    for budget in (0.3, 0.6, 0.9):
        found = fc.forecast(model, old, new, training, budget=budget, head="placed")
        rows = max(len(near) for near in found._surrogates[1:])
        assert max(found._windows) * rows <= 64
        most.append(max(found._windows))
    assert most[0] > most[1] > most[2] >= 1
