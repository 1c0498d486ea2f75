"""Which share of the body's motion is believed: by two paths along every other anchor."""

from dataclasses import replace

import pytest
import torch
from small_networks import NEW, network_and_task
from test_memory_of_a_run import BATCHING, near_some_point

import forgetcast as fc
from forgetcast.forecast.network.given import given
from forgetcast.forecast.network.halves import Halves
from forgetcast.forecast.network.steps import Batching, ExpectedStep
from forgetcast.forecast.network.stock import Stock, stock
from forgetcast.forecast.network.walker import Place, Walker

TRAINING = fc.AdamW(learning_rate=3e-3, steps=60, batch_size=16, classes=NEW)


def learner(seed: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.Tanh(), torch.nn.Linear(60, 5))
    return model, torch.randn(60, 40), torch.randn(400, 40)


def walkers(held: Stock | None = None, batching: Batching = BATCHING) -> tuple[Walker, Walker]:
    model, old, new = network_and_task("perceptron")
    net = given(model, old, new, TRAINING, None, None, None).net
    _, theta, weight, bias = near_some_point(0)
    training, place = fc.SGD(0.1, 10, batch_size=8), Place(theta, weight, bias)
    both = (Walker(net, training, place.copy(), batching, stock=held) for _ in range(2))
    return next(both), next(both)


def test_each_takes_every_other_anchor_and_both_the_first():
    halves = Halves(walkers())
    anchors = [near_some_point(seed)[0] for seed in range(5)]
    for near in anchors:
        halves.take(near, 8)
    first, second = (walker.near.parts for walker in halves.walkers)
    assert [id(part) for part in first] == [id(anchors[k]) for k in (0, 2, 4)]
    assert [id(part) for part in second] == [id(anchors[k]) for k in (0, 1, 3)]


@pytest.mark.parametrize(
    ("other", "share"),
    [([3.0, 4.0], 1.0), ([6.0, 8.0], 1.0), ([-4.0, 3.0], 0.0), ([-3.0, -4.0], 0.0), ([5.0, 0.0], 0.36)],
)
def test_the_share_is_what_one_motion_explains_of_the_other(other, share):
    near = near_some_point(0)[0]
    halves = Halves(walkers(stock(near.features, near.objective, whole=False)), count=3)
    for walker, motion in zip(halves.walkers, ([3.0, 4.0], other), strict=True):
        walker.motion = torch.tensor(motion)
    assert halves.take(near, 8) == pytest.approx(share)
    assert [walker.believed for walker in halves.walkers] == pytest.approx([share, share])


@pytest.mark.parametrize(
    ("other", "share"), [([6.0, 8.0], 1.0), ([5.0, 0.0], 1.0), ([-0.58318, 0.81239], 0.6), ([-4.0, 3.0], 0.0)]
)
def test_of_a_fresh_head_twice_the_cosine_is_told_and_all_is_walked(other, share):
    halves, near = Halves(walkers(batching=replace(BATCHING, few=True)), count=3), near_some_point(0)[0]
    for walker, motion in zip(halves.walkers, ([3.0, 4.0], other), strict=True):
        walker.motion = torch.tensor(motion)
    assert halves.take(near, 8) == pytest.approx(share, abs=1e-4)
    walker = halves.walkers[1]
    walker.motion = torch.zeros_like(walker.origin)
    walker.step()
    assert float(walker.motion.norm()) > 0
    assert torch.allclose(walker.place.theta, walker.origin + walker.motion)
    assert torch.allclose(walker.told().theta, walker.origin + walker.believed * walker.motion)


def test_halves_with_heads_of_their_own_say_nothing_of_the_body():
    halves = Halves(walkers(), count=3)
    for walker, motion in zip(halves.walkers, ([3.0, 4.0], [-4.0, 3.0]), strict=True):
        walker.motion = torch.tensor(motion)
    assert halves.take(near_some_point(0)[0], 8) == 1


def test_the_noise_of_a_step_is_that_of_its_own_samples(monkeypatch):
    """Drawn by their size, samples are worth more than their weights tell; so are those that the momentum remembers."""
    walker, _ = walkers()
    near, *_ = near_some_point(0)
    chance = near.lengths / near.lengths.sum()
    walker.take(replace(near, weights=(1 / chance) / (1 / chance).sum()), 8)
    told, step = [], ExpectedStep.step
    monkeypatch.setattr(ExpectedStep, "step", lambda *given: told.append(given[3:5]) or step(*given))
    features = walker.near.moved(walker.place.theta)
    sharp = walker.near.body(features, walker.place.weight, walker.place.bias, walker.profile)[2]
    walker.step()
    assert abs(sharp / walker.near.effective - 1) > 0.05
    assert told[0] == pytest.approx((sharp, sharp))


def test_anchors_that_say_the_same_are_believed():
    model, old, new = learner(0)
    same = new[:1].expand(400, -1).clone(), torch.full((400,), 4)
    found = fc.forecast(model, old, same, TRAINING, budget=0.3)
    assert len(found._shares) > 8
    assert min(found._shares) > 0.99


@pytest.mark.usefixtures("unchecked_types")
def test_noise_is_not_walked_and_the_forecast_is_nearer_for_it(monkeypatch):
    """Labels of noise: what few samples say of the mean gradient is mostly noise."""
    errors = torch.zeros(2)
    for seed in range(3):
        model, old, inputs = learner(seed)
        new = inputs, torch.randint(2, 5, (400,))
        run = fc.forecast(model, old, new, TRAINING, budget=1.0).drift
        found = fc.forecast(model, old, new, TRAINING, budget=0.25, seed=seed)
        with monkeypatch.context() as patch:
            patch.setattr(Halves, "_share", lambda _: 1.0)
            whole = fc.forecast(model, old, new, TRAINING, budget=0.25, seed=seed)
        assert found._shares[-1] < 0.8
        assert float((found.end.theta - found.start.theta).norm()) < float((whole.end.theta - whole.start.theta).norm())
        errors += torch.stack([(found.drift - run).norm(), (whole.drift - run).norm()])
    assert float(errors[0]) < 0.9 * float(errors[1])


def test_a_path_is_walked_again_with_its_shares():
    model, old, new = network_and_task("perceptron", new=120)
    training = fc.AdamW(5e-3, 30, batch_size=10, classes=NEW)
    found = fc.forecast(model, old, new, training, budget=0.5)
    assert min(found._shares) < 1
    assert torch.equal(found.what_if().end.theta, found.end.theta)


def test_the_run_itself_is_believed():
    model, old, new = network_and_task("perceptron")
    assert set(fc.forecast(model, old, new, TRAINING, budget=1)._shares) <= {1.0}
