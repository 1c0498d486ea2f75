"""How a budget is spent: never more than was allowed, and counted as it is spent."""

import re
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_networks import NEW, network_and_task

import forgetcast as fc
from forgetcast.forecast.network.plan import CHECK_OLD, FORWARD, plan_anchors, reading_steps

SIZES = {
    "steps": st.integers(1, 500),
    "batch": st.integers(1, 128),
    "new": st.integers(1, 2000),
    "old": st.integers(1, 2000),
    "look": st.booleans(),
    "fresh": st.booleans(),
    "half": st.booleans(),
}


@example({"steps": 3, "batch": 1000, "new": 2000, "old": 20, "look": True, "fresh": False, "half": True}, 0.9)
@given(st.fixed_dictionaries(SIZES), st.floats(0.001, 0.999))
def test_a_plan_costs_at_most_its_budget(sizes, budget):
    try:
        plan = plan_anchors(**sizes, budget=budget)
    except ValueError as refusal:
        least = float(re.search(r"expected at least ([\d.e+-]+)\.", str(refusal))[1])
        assert least > budget
        if least < 1:  # the remedy helps
            plan_anchors(**sizes, budget=least)
        return
    steps = [step for step, _ in plan.anchors]
    assert 0 < plan.cost <= budget * plan.run * (1 + 1e-12)
    assert plan.share <= budget * (1 + 1e-12)
    assert plan.new_cost <= plan.cost
    assert not plan.exact
    assert steps[0] == 0
    assert steps == sorted(set(steps))
    assert steps[-1] < sizes["steps"]
    assert all(0 < rows <= sizes["new"] for _, rows in plan.anchors)
    assert plan.readings[-1] == sizes["steps"]
    assert plan.checks > 0
    assert plan.looked <= sizes["new"]
    assert (sizes["look"] and not sizes["fresh"]) or not plan.looked
    assert plan.fresh == sizes["fresh"]
    assert plan.window == 1 or not plan.fresh


@given(st.fixed_dictionaries(SIZES), st.floats(1, 5))
def test_the_whole_budget_is_the_run(sizes, budget):
    plan = plan_anchors(**sizes, budget=budget)
    assert plan.exact
    assert plan.looked == plan.checks == 0
    assert plan.anchors == tuple((step, sizes["batch"]) for step in range(sizes["steps"]))
    assert plan.new_cost == plan.run == sizes["steps"] * sizes["batch"]


@given(st.integers(1, 10_000), st.integers(1, 6))
def test_readings_end_at_the_end(steps, count):
    found = reading_steps(steps, count)
    assert found[-1] == steps
    assert found[0] >= 1
    assert len(found) <= count
    assert list(found) == sorted(set(found))


def test_nothing_to_do():
    plan = plan_anchors(steps=0, batch=8, new=10, old=10, budget=0.5, look=True)
    assert plan.exact
    assert plan.share == 0
    assert plan.anchors == ()


@contextmanager
def counted(model):
    """Samples that go through the model: [without a graph, with one]."""
    found = [0, 0]

    def count(module, given, output):
        found[int(output.requires_grad)] += len(output)

    handle = model[0].register_forward_hook(count)  # the head alone is called while rows are placed
    yield found
    handle.remove()


SURVEY = 8  # samples that are looked at first, to find the head and how gradients are to be had


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("budget", "old", "steps"), [(0.3, 20, 80), (0.6, 200, 80), (0.15, 5, 300), (0.9, 40, 12)])
@pytest.mark.parametrize("head", ["as_is", "placed"])
def test_what_is_counted_is_what_is_done(head, budget, old, steps):
    model, old_samples, new = network_and_task("perceptron", old=old, new=90)
    training = fc.AdamW(1e-3, steps, batch_size=10, classes=NEW)
    with counted(model) as found:
        forecast = fc.forecast(model, old_samples, new, training, budget=budget, head=head)
    forwards, backwards = found
    free = old + (len(new[1]) if head == "placed" else 0)  # the logits before, and placing, which the training does too
    done = backwards + FORWARD * (forwards - free)
    told = forecast.share_of_run * steps * 10
    assert told <= budget * steps * 10
    # an anchor that draws a sample twice reads it once
    assert 0.85 * told - SURVEY <= done <= told + SURVEY


@pytest.mark.parametrize("budget", [0.3, 0.7, 1.0])
def test_what_a_pilot_counts_is_what_it_does(budget):
    model, old, new = network_and_task("perceptron", old=CHECK_OLD, new=90)
    training = fc.SGD(0.01, 60, batch_size=10)
    with counted(model) as found:
        forecast = fc.forecast(model, old, new, training, budget=budget, estimator="pilot")
    done = found[1] + FORWARD * (found[0] - CHECK_OLD)
    assert done == pytest.approx(forecast.share_of_run * 600, abs=SURVEY)
    assert forecast.share_of_run <= budget or forecast.trust.exact


def test_a_pilot_that_cannot_be_paid_for_says_what_can():
    model, old, new = network_and_task("perceptron", old=30, new=90)
    training = fc.SGD(0.01, 60, batch_size=10)
    with pytest.raises(ValueError, match="for a pilot of 60 steps.*; expected at least .*Raise budget") as refusal:
        fc.forecast(model, old, new, training, budget=0.12, estimator="pilot")
    least = float(re.search(r"at least ([\d.]+):", str(refusal.value))[1])
    assert fc.forecast(model, old, new, training, budget=least, estimator="pilot").share_of_run <= least


@pytest.mark.parametrize("estimator", ["anchored", "pilot"])
def test_progress_is_told(estimator):
    model, old, new = network_and_task("perceptron", new=40)
    told: list[int] = []
    fc.forecast(model, old, new, fc.SGD(0.01, 30, batch_size=8), budget=0.5, estimator=estimator, on_step=told.append)
    assert told == list(range(1, 31))


@pytest.mark.usefixtures("unchecked_types")
def test_more_budget_is_more_like_the_run():
    """Median over seeds of the error, halved at least from a small budget to a large one."""
    errors: dict[float, list[float]] = {0.2: [], 0.9: []}
    for seed in range(3):
        model, old, new = network_and_task("perceptron", old=8, new=90, seed=seed)
        training = fc.AdamW(3e-3, 60, batch_size=16, classes=NEW)
        run = fc.forecast(model, old, new, training, budget=1).drift
        for budget, found in errors.items():
            drift = fc.forecast(model, old, new, training, budget=budget, seed=seed).drift
            found.append(float((drift - run).norm() / run.norm()))
    small, large = (torch.tensor(found).median().item() for found in errors.values())
    assert large < 0.5 * small
