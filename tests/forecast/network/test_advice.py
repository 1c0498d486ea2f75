"""`advise`: every point is held against a real training of that candidate, and the choice against all of them."""

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given as property_of
from hypothesis import strategies as st
from real_run import logits_of, really_trained
from scipy.stats import norm
from small_networks import NEW, network_and_task
from test_budget import SURVEY, counted

import forgetcast as fc
from forgetcast.forecast.network.plan import FORWARD
from forgetcast.forecast.network.probes import smoothed_accuracy

TRAININGS = {
    "adam": fc.AdamW(0.05, 12, batch_size=8, weight_decay=0.1, classes=NEW),
    "momentum": fc.SGD(0.1, 12, batch_size=8, momentum=0.9),
    "squared": fc.GradientDescent(0.01, 12, classes=NEW),
}


def case(name="perceptron", *, new=40, seed=0):
    """A model that knows its old task well and the new one a little, old samples, and new ones."""
    model, old, new = network_and_task(name, old=30, new=new, seed=seed)
    model = really_trained(model, new, fc.AdamW(0.02, 10, batch_size=10))
    model = really_trained(model, old, fc.AdamW(0.02, 10, batch_size=10))
    model.zero_grad()
    return model, old, new


def only(model, candidate):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in candidate.parameters)
    return model


def accuracies(model, *samples):
    with torch.no_grad():
        return [float((logits_of(model, inputs).argmax(1) == labels).double().mean()) for inputs, labels in samples]


def smoothed_by_hand(logits, labels):
    logits = logits.detach().double().numpy()
    own = logits[np.arange(len(labels)), labels]
    logits[np.arange(len(labels)), labels] = -np.inf
    margins = own - logits.max(1)
    return norm.cdf(margins / (1.06 * margins.std() * len(margins) ** (-1 / 3))).mean()


def between(first, second, length):
    """A model on the way from one to another."""
    made = deepcopy(first).eval()
    with torch.no_grad():
        for parameter, goal in zip(made.parameters(), second.parameters(), strict=True):
            parameter.add_(goal - parameter, alpha=length)
    return made


@pytest.mark.parametrize(
    ("name", "training"), [("perceptron", "adam"), ("perceptron", "momentum"), ("lora", "momentum"), ("prefix", "adam")]
)
def test_with_the_whole_budget_every_point_is_a_real_training(name, training):
    model, old, new = case(name)
    training = TRAININGS[training]
    advice = fc.advise(model, old, new, training, budget=1, lengths=(0.0, 0.5, 1.0))
    assert len(advice.points) == 3 * len(fc.candidates(model, old))
    moved = 0
    for point in advice.points:
        real = really_trained(only(model, point.candidate), new, training)
        seen = accuracies(between(model, real, point.length), old, new)
        assert [point.old_accuracy, point.new_accuracy] == seen
        assert point.drop == advice.accuracy_before - point.old_accuracy
        assert point.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert point.trusted
        moved += seen != accuracies(model, old, new)
    assert moved > 3
    assert advice.accuracy_before == accuracies(model, old)[0]


def test_a_head_alone_is_exact_for_any_budget():
    model, old, new = case(new=300)
    training = fc.AdamW(0.02, 120, batch_size=30)
    (given, *_) = fc.candidates(model, old)
    advice = fc.advise(model, old, new, training, candidates=[given], budget=0.2)
    (head,) = advice.points
    real = really_trained(only(model, head.candidate), new, training)
    assert (head.candidate.name, head.trusted, head.reason) == ("head", True, "exact")
    assert head.old_accuracy == accuracies(real, old)[0]
    assert head.share_of_run == pytest.approx(FORWARD * 300 / 3600)
    assert advice.share <= 0.2


@pytest.mark.parametrize(
    ("training", "head"), [("adam", "as_is"), ("adam", "placed"), ("momentum", "placed"), ("squared", "as_is")]
)
def test_the_ends_of_the_way(training, head):
    """No length is the model as it is, placed; the whole one has the accuracy of the forecast."""
    model, old, new = case(new=90)
    training = replace(TRAININGS[training], steps=24)
    budget = 0.7
    settings = {"head": head, "budget": budget}
    tried = fc.candidates(model, old)[::2]
    advice = fc.advise(model, old, new, training, candidates=tried, lengths=(0.0, 1.0), **settings)
    run = 24 * (90 if isinstance(training, fc.GradientDescent) else 8)
    for still, whole in zip(advice.points[::2], advice.points[1::2], strict=True):
        if head == "as_is":
            assert still.old_accuracy == advice.accuracy_before == accuracies(model, old)[0]
            assert still.drop == 0
        names = whole.candidate.parameters
        left = budget if whole.candidate.name == "head" else budget - FORWARD * advice.new_samples / run
        forecast = fc.forecast(model, old, new, training, parameters=names, **settings | {"budget": left})
        assert whole.old_accuracy == forecast.accuracy
        assert still.old_accuracy == pytest.approx(
            float(((forecast.logits - forecast.drift).argmax(1) == old[1]).double().mean())
        )


def test_answers_among_some_outputs():
    model, old, new = case()
    own = {"answers_now": (0, 1), "answers_then": (0, 1), "answers_new": NEW}
    masks = {name: torch.zeros(1, 5, dtype=torch.bool) for name in own}
    for name, chosen in own.items():
        masks[name][0, list(chosen)] = True
    training = TRAININGS["momentum"]
    advice = fc.advise(model, old, new, training, budget=1, **masks)
    for point in advice.points:
        real = really_trained(only(model, point.candidate), new, training)
        with torch.no_grad():
            kept = (real(old[0])[:, :2].argmax(1) == old[1]).double().mean()
            reached = (2 + real(new[0])[:, 2:].argmax(1) == new[1]).double().mean()
        assert [point.old_accuracy, point.new_accuracy] == [float(kept), float(reached)]
    each = {name: mask.expand(30 if name != "answers_new" else 40, -1) for name, mask in masks.items()}
    assert fc.advise(model, old, new, training, budget=1, **each).points == advice.points


def test_validation_samples_take_the_place_of_new_ones():
    model, old, new = case()
    other = case(seed=1)[2]
    training = TRAININGS["momentum"]
    advice = fc.advise(model, old, new, training, budget=1, validation=other)
    for point in advice.points:
        real = really_trained(only(model, point.candidate), new, training)
        assert point.new_accuracy == accuracies(real, other)[0]


def test_the_recommendation_is_the_best_of_the_points():
    given, training = case("lora"), TRAININGS["adam"]
    free = fc.advise(*given, training, budget=1, old_weight=0.0)
    assert free.recommended.score == max(point.score for point in free.points)
    assert free.within_limit
    drops = sorted(point.drop for point in free.points)
    assert drops[0] > 0.05  # every candidate forgets
    limit = (drops[0] + drops[-1]) / 2
    held = fc.advise(*given, training, budget=1, old_weight=0.0, max_drop=limit)
    fine = [point for point in held.points if point.drop <= limit]
    assert 0 < len(fine) < len(held.points)
    assert held.recommended.score == max(point.score for point in fine)
    none = fc.advise(*given, training, budget=1, max_drop=0.0)
    assert not none.within_limit
    assert none.recommended.drop == drops[0]
    assert none.reason.startswith("nothing stays within a drop of 0.0 points")


def test_every_class_counts_alike_unless_told_otherwise():
    model, old, new = case()
    training = TRAININGS["adam"]
    advice = fc.advise(model, old, new, training, budget=1)
    assert advice.old_weight == 2 / 5
    for point in advice.points:
        real = really_trained(only(model, point.candidate), new, training)
        kept, reached = (smoothed_by_hand(logits_of(real, side[0]), side[1]) for side in (old, new))
        assert point.score == pytest.approx(0.4 * kept + 0.6 * reached, abs=1e-6)
    table = advice.table
    assert list(table["candidate"]) == ["head", "last 1", "all"]
    assert table["recommended"].sum() == 1
    assert table["frontier"].sum() == len(advice.frontier)


@pytest.mark.parametrize(
    ("budget", "lengths", "head"),
    [(0.3, (1.0,), "as_is"), (0.5, (0.0, 0.5, 1.0), "placed"), (0.9, (0.3, 0.7), "as_is")],
)
def test_what_is_counted_is_what_is_done(budget, lengths, head):
    """The whole advice stays within the budget, its readings included."""
    model, old, new = case(new=90)
    steps, batch = 60, 10
    training = fc.AdamW(1e-3, steps, batch_size=batch, classes=NEW)
    tried = fc.candidates(model, old)[::2]
    assert [each.name for each in tried] == ["head", "all"]
    with counted(model) as found:
        advice = fc.advise(model, old, new, training, candidates=tried, budget=budget, lengths=lengths, head=head)
    forwards, backwards = found
    start = 30 + (90 if head == "placed" else advice.new_samples)
    done = backwards + FORWARD * (forwards - start)
    told = advice.share * len(tried) * steps * batch
    assert advice.share <= budget
    assert max(point.share_of_run for point in advice.points) <= budget
    assert 0.85 * told - SURVEY <= done <= told + SURVEY
    assert advice.cost.passes["old"] >= 1 + len([length for length in lengths if 0 < length < 1])


def test_the_model_is_left_as_it_is():
    model, old, new = case("lora")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    fc.advise(model, old, new, TRAININGS["adam"], budget=1, lengths=(0.5, 1.0), head="placed")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, parameter in model.named_parameters():
        assert (parameter.requires_grad, parameter.grad) == (trained[name], None)
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_that_are_restrained_are_restrained_for_every_candidate():
    model, old, new = case()
    training = replace(TRAININGS["momentum"], momentum=0.0)
    every = {name for name, _ in model.named_parameters()}

    def restraint(before, step):
        assert set(before) == set(step) == every  # what stands still takes a step of zero
        return {name: value / 2 for name, value in step.items()}

    half = fc.advise(model, old, new, training, budget=1, restraint=restraint)
    slow = fc.advise(model, old, new, replace(training, learning_rate=0.05), budget=1)
    rows = [[(p.candidate, p.old_accuracy, p.new_accuracy) for p in advice.points] for advice in (half, slow)]
    assert rows[0] == rows[1]


def test_progress_is_told():
    model, old, new = case()
    told = []
    fc.advise(model, old, new, TRAININGS["adam"], budget=1, on_step=told.append)
    assert told[-1] == 36
    assert all(before <= after for before, after in pairwise(told))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": []}, r"got candidates \[\]; expected at least one"),
        ({"candidates": [fc.Candidate("a", ("0.wieght",))]}, "the parameter name '0.wieght'.*nearest are .*0.weight"),
        ({"candidates": [fc.Candidate("a", ("0.weight",))] * 2}, "got candidates .*each of its own name"),
        (
            {"candidates": [fc.Candidate("a", ("0.weight",))], "parameters": ["4.weight"]},
            r"the candidate 'a' with \['0.weight'\]; expected parameters among those that may train",
        ),
        ({"lengths": ()}, r"got lengths=\(\); expected at least one"),
        ({"lengths": (1.0, 1)}, "none twice"),
        ({"lengths": (1.5,)}, "got lengths=1.5; expected a finite number of at least 0 and at most 1"),
        ({"lengths": (-0.1,)}, "got lengths=-0.1"),
        ({"lengths": (float("nan"),)}, "got lengths=nan"),
        ({"max_drop": -0.1}, "got max_drop=-0.1; expected a finite number of at least 0 and at most 1"),
        ({"max_drop": float("nan")}, "got max_drop=nan"),
        ({"old_weight": 1.1}, "got old_weight=1.1"),
        ({"budget": 0.0}, "got budget=0.0; expected a finite number above 0"),
        ({"budget": 0.1}, "budget=0.1 with 1 lengths .*; expected at least .*fewer lengths"),
        ({"new_samples": 0}, "got new_samples=0; expected an integer of at least 1"),
        ({"estimator": "anchord"}, "Did you mean 'anchored'"),
        ({"validation": torch.zeros(3, 6, dtype=torch.float64)}, "validation: no targets"),
        ({"validation": (torch.zeros(3, 5, dtype=torch.float64), torch.arange(3))}, "validation: inputs of shapes"),
        ({"answers_then": torch.ones(4, 5, dtype=torch.bool)}, r"answers_then of shape \(4, 5\).*of shape \(30, 5\)"),
        ({"answers_now": torch.ones(1, 4, dtype=torch.bool)}, r"answers_now of shape \(1, 4\)"),
        ({"answers_new": torch.zeros(1, 5, dtype=torch.bool)}, "answers_new without the label of 40 samples"),
    ],
)
def test_what_does_not_fit(settings, message, unchecked_types):
    model, old, new = case()
    with pytest.raises(ValueError, match=message):
        fc.advise(model, old, new, TRAININGS["adam"], **({"budget": 1.0} | settings))


def test_samples_without_labels_and_samples_that_are_not_finite():
    model, old, new = case()
    training = TRAININGS["squared"]
    values = torch.zeros(40, 5, dtype=torch.float64)
    for given, message in (
        ((old[0], new), "old: no targets"),
        ((old, (new[0], values)), "new: .*labels"),
        (((old[0] * torch.nan, old[1]), new), "old samples of shape .* holds nan"),
        ((old, (new[0] * torch.inf, new[1])), "new samples of shape .* holds (inf|nan|-inf)"),
    ):
        with pytest.raises(ValueError, match=message):
            fc.advise(model, *given, training)


@property_of(st.integers(1, 60), st.floats(1e-3, 1e3), st.integers(0, 999))
def test_smoothed_accuracy_has_no_scale_and_lies_between_none_and_all(n, scale, seed):
    margins = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = smoothed_accuracy(margins)
    assert 0 <= found <= 1
    assert smoothed_accuracy(scale * margins) == pytest.approx(found)
    assert smoothed_accuracy(-margins) == pytest.approx(1 - found)


def test_smoothed_accuracy_where_nothing_can_be_smoothed():
    assert smoothed_accuracy(torch.tensor([2.0, 2.0, 2.0])) == 1.0
    assert smoothed_accuracy(torch.tensor([-0.5])) == 0.0
    assert smoothed_accuracy(torch.tensor([0.0, 0.0])) == 0.0
    assert smoothed_accuracy(torch.tensor([torch.inf, torch.inf, -1.0])) == pytest.approx(2 / 3)
    some = smoothed_accuracy(torch.tensor([torch.inf, 1.0, -1.0]))
    assert some == pytest.approx(2 / 3)


@pytest.mark.parametrize("seed", range(5))
def test_smoothed_accuracy_tells_two_models_apart_better_than_counting(seed):
    """Margins of two models on the same samples, of which one is right 1.4 points more often."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(2000, 150, generator=draw, dtype=torch.float64)
    worse, better = (shared + 0.3 * torch.randn(2000, 150, generator=draw) + shift for shift in (0.5, 0.55))
    told = [sum(smoothed_accuracy(b) > smoothed_accuracy(a) for a, b in zip(worse, better, strict=True)) / 2000]
    counted_right = ((better > 0).double().mean(1) > (worse > 0).double().mean(1)).double().mean()
    assert told[0] > float(counted_right) + 0.05
