"""Points are told apart on as few old samples as it takes, and what is given up is surely not to be chosen."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_run import really_trained
from scipy.stats import norm
from small_networks import NEW, network_and_task
from test_budget import SURVEY, counted
from torch import nn

import forgetcast as fc
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.plan import FORWARD
from forgetcast.forecast.network.points import FIRST_OLD, RACE_SHARE
from forgetcast.forecast.network.probes import Probe, balanced_order
from forgetcast.forecast.network.race import LEAST_MORE, SURE, Entrant, Rules, race
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.trust import Trust
from forgetcast.forecast.network.walker import Place
from forgetcast.tangent.jacobian import logits_of

OLD, FIRST, CLASSES, WIDTH = 400, 40, 4, 6
HALF = Rules(accuracy_before=0.9, old_weight=0.5, max_drop=None)
NOISES = (0.2, 0.3, 0.5, 1.0, 3.0)


def entered(noises, seed):
    """Heads that are the true one and so much noise, each read on the first old samples and on new ones; all old."""
    made = torch.Generator().manual_seed(seed)
    model = nn.Linear(WIDTH, CLASSES)
    net = Network(model, logits_of, model, {}, dict(model.named_parameters()), CLASSES, WIDTH)
    true = torch.randn(CLASSES, WIDTH, generator=made)

    def probe():
        features = torch.randn(OLD, WIDTH, generator=made)
        labels = (features @ true.T + torch.randn(OLD, CLASSES, generator=made)).argmax(1)
        return Probe(Samples(features, labels, "old"), labels, features, torch.ones(OLD, CLASSES, dtype=torch.bool))

    old, new, entrants = probe(), probe(), []
    for noise in noises:
        weight = true + noise * torch.randn(CLASSES, WIDTH, generator=made)
        one = Entrant(
            fc.Candidate(f"{noise}", ("weight",)),
            net,
            1.0,
            Place(torch.empty(0), weight, torch.zeros(CLASSES)),
            0.0,
            Trust(None, None, 0.0, False, exact=True),
            old.part(0, FIRST).answers(old.features[:FIRST] @ weight.T),
            new.answers(new.features @ weight.T),
        )
        entrants.append(one)
    return entrants, old


def smoothed_by_hand(margins):
    margins = margins.double().numpy()
    return norm.cdf(margins / (1.06 * margins.std() * len(margins) ** (-1 / 3)))


def sigmas(leader, other, count, weight=0.5):
    """By how many standard errors of the paired difference the score of the one is above that of the other."""
    old = weight * (smoothed_by_hand(leader.old.margins[:count]) - smoothed_by_hand(other.old.margins[:count]))
    new = (1 - weight) * (smoothed_by_hand(leader.new.margins) - smoothed_by_hand(other.new.margins))
    return (old.mean() + new.mean()) / np.sqrt(old.var() / len(old) + new.var() / len(new))


@pytest.mark.parametrize("weight", [0.2, 0.8])
def test_the_rule_is_two_standard_errors_of_the_paired_difference(weight):
    decided = Counter()
    for seed in range(20):
        entrants, _ = entered(NOISES, seed)
        rules = Rules(0.9, weight, None)
        leader = rules.leader(entrants)
        for each in entrants:
            if each is not leader:
                out = sigmas(leader, each, FIRST, weight) > SURE
                assert rules.out(each, leader) == out
                decided[bool(out)] += 1
    assert min(decided.values()) > 10


def test_what_was_given_up_is_told_by_its_distance_on_the_samples_that_both_had_met():
    (leader, other), old = entered((0.2, 0.3), 1)
    leader.old = leader.old.then(leader.read(old.part(FIRST, OLD)))
    other.behind = leader, FIRST
    for k, of in enumerate((lambda a: a.right.numpy(), lambda a: smoothed_by_hand(a.margins))):
        expected = of(leader.old).mean() + of(other.old).mean() - of(leader.old.first(FIRST)).mean()
        assert other.told()[k] == pytest.approx(expected, abs=1e-12)
        assert other.told()[k] != pytest.approx(other.kept(FIRST)[k], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_who_is_given_up_was_behind_by_more_than_chance(seed):
    entrants, old = entered(NOISES, seed)
    assert race(entrants, old, HALF, allowance=0.0, run=1.0) == 0  # heads alone take no pass
    gone = [each for each in entrants if each.behind is not None]
    left = [each for each in entrants if each.behind is None]
    assert gone
    for each in gone:
        leader, count = each.behind
        assert len(each.old) == count < OLD
        assert len(leader.old) >= count
        assert sigmas(leader, each, count) > SURE
    assert len(left) == 1 or {len(each.old) for each in left} == {OLD}


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_the_one_that_wins_has_the_best_score_of_all(seed):
    """Also of those that had met easier samples when they were given up."""
    entrants, old = entered(NOISES, seed)
    race(entrants, old, HALF, allowance=0.0, run=1.0)
    points = HALF.points(entrants)
    best = max(points, key=lambda point: point.score)
    assert entrants[points.index(best)].behind is None
    assert best.old_samples == max(point.old_samples for point in points)
    assert all(0 <= point.old_accuracy <= 1 for point in points)


def test_few_samples_are_read_and_the_choice_is_as_good():
    """Over many fields: fewer than 6 of 10 readings, and hardly ever a worse winner than by all samples."""
    read, lost = [], []
    for seed in range(40):
        entrants, old = entered(NOISES, seed)
        whole = [0.5 * smoothed_by_hand(old.answers(old.features @ each.place.weight.T).margins).mean()
                 + 0.5 * smoothed_by_hand(each.new.margins).mean() for each in entrants]  # fmt: skip
        race(entrants, old, HALF, allowance=0.0, run=1.0)
        points = HALF.points(entrants)
        read.append(sum(point.old_samples for point in points) / (OLD * len(points)))
        lost.append(max(whole) - whole[points.index(max(points, key=lambda point: point.score))])
    assert np.mean(read) < 0.6
    assert np.quantile(lost, 0.9) < 0.005


@pytest.mark.parametrize("limit", [0.05, 0.3])
def test_with_a_limit_nobody_is_given_up_who_may_be_the_best_within_it(limit):
    for seed in range(8):
        entrants, old = entered(NOISES, seed)
        rules = Rules(0.9, 0.5, limit)
        race(entrants, old, rules, allowance=0.0, run=1.0)
        for each in entrants:
            if each.behind is None:
                continue
            leader, count = each.behind
            own, other = each.old.right[:count].numpy(), leader.old.right[:count].numpy()
            kept = 0.9 - limit
            lost = other - own
            error = np.sqrt(own.var() / count), np.sqrt(other.var() / count), np.sqrt(lost.var() / count)
            beyond = kept - own.mean() > SURE * error[0]
            safely_behind = other.mean() - kept > SURE * error[1] and sigmas(leader, each, count) > SURE
            drops_more = lost.mean() > SURE * error[2]
            assert beyond or safely_behind or drops_more


@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_every_beginning_is_balanced(counts, seed, share):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = balanced_order(labels, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    first = round(share * len(labels))
    met = Counter(labels[order[:first]].tolist())
    for label, count in enumerate(counts):
        part = count / len(labels)
        assert abs(met[label] - first * part) <= 0.5 + part * (0.5 * len(counts) + 1) + 1e-9


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("rate", "max_drop", "samples"), [(1e-3, None, 500), (1e-3, 0.2, 500), (1e-5, 0.01, 2000)])
def test_what_is_counted_is_what_is_done(rate, max_drop, samples):
    model, old, new = network_and_task("perceptron", old=samples, new=90)
    model = really_trained(model, old, fc.AdamW(0.02, 40, batch_size=50))
    steps, batch, budget = 60, 60, 0.5
    training = fc.AdamW(rate, steps, batch_size=batch, classes=NEW)
    tried = fc.candidates(model, old)[::2]
    with counted(model) as found:
        advice = fc.advise(
            model, old, new, training, candidates=tried, budget=budget, lengths=(0.0, 0.5, 1.0), max_drop=max_drop
        )
    forwards, backwards = found
    read = [point.old_samples for point in advice.points]
    assert min(read) >= FIRST_OLD
    assert advice.recommended.old_samples == max(read) > FIRST_OLD
    told = advice.share * len(tried) * steps * batch
    done = backwards + FORWARD * (forwards - samples - advice.new_samples)
    assert 0.85 * told - SURVEY <= done <= told + SURVEY
    assert advice.share <= budget
    more = [point.old_samples - FIRST_OLD for point in advice.points if point.candidate.name != "head" and point.length]
    readings = FORWARD * (2 * advice.new_samples + FIRST_OLD)  # of two lengths that move; one old reading is shared
    left = RACE_SHARE * (budget * steps * batch - readings) - FORWARD * sum(more)
    assert left >= 0
    base = {
        point.candidate.name: point.share_of_run - FORWARD * (point.old_samples - FIRST_OLD) / (steps * batch)
        for point in advice.points
        if point.candidate.name != "head" and point.length
    } | {point.candidate.name: point.share_of_run for point in advice.points if point.candidate.name == "head"}
    assert sum(base.values()) + FORWARD * sum(more) / (steps * batch) == pytest.approx(advice.share * len(tried))
    if samples == 2000:  # hardly a difference to be seen: what is put by for it is spent
        assert max(read) < samples
        assert left < FORWARD * LEAST_MORE * len(more)


@pytest.mark.usefixtures("unchecked_types")
def test_points_that_are_one_and_the_same_are_all_read_on_all():
    """At length 0 every candidate is the model as it is, whose accuracy is known."""
    model, old, new = network_and_task("perceptron", old=300, new=60)
    training = fc.AdamW(0.01, 10, batch_size=60, classes=NEW)
    advice = fc.advise(model, old, new, training, budget=0.9, lengths=(0.0,))
    assert [point.old_samples for point in advice.points] == [300] * 3
    assert [point.drop for point in advice.points] == [0.0] * 3


@pytest.mark.usefixtures("unchecked_types")
def test_old_samples_may_come_in_any_order():
    """Of a model that always gives the first label half of the answers are right, also of the first that are read."""
    model, (inputs, labels), new = network_and_task("perceptron", old=1000, new=60)
    with torch.no_grad():
        model[-1].bias[0] += 100
    order = torch.argsort(labels)
    training = fc.AdamW(1e-6, 20, batch_size=60, classes=NEW)
    advice = fc.advise(model, (inputs[order], labels[order]), new, training, budget=0.4)
    assert min(point.old_samples for point in advice.points) < 400
    for point in advice.points:
        assert point.old_accuracy == pytest.approx(advice.accuracy_before, abs=0.01)


def test_where_all_is_paid_for_all_is_read():
    model, old, new = network_and_task("perceptron", old=300, new=60)
    advice = fc.advise(model, old, new, fc.AdamW(0.01, 6, batch_size=20, classes=NEW), budget=1)
    assert {point.old_samples for point in advice.points} == {300}


def test_a_training_of_no_steps_leaves_all_as_it_is():
    model, old, new = network_and_task("perceptron", old=300, new=60)
    advice = fc.advise(model, old, new, fc.AdamW(0.01, 0, batch_size=20, classes=NEW), budget=0.5)
    assert {point.drop for point in advice.points} == {0.0}
