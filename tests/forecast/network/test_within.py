"""Smaller trainings followed along the anchors of a larger one."""

from dataclasses import replace
from statistics import fmean
from time import perf_counter

import pytest
import torch
from small_networks import NEW, OUTPUTS, network_and_task
from torch import nn

import forgetcast as fc
from builders import relative_error
from forgetcast.forecast.network.candidates import narrowed, nested
from forgetcast.forecast.network.entry import forecast_from
from forgetcast.forecast.network.given import given
from forgetcast.forecast.network.pilot import trained_path
from forgetcast.forecast.network.start import read_start
from forgetcast.forecast.network.within import contains, forecast_within, reading_cost

RUN = fc.AdamW(6e-3, 24, batch_size=10, classes=NEW)


class Sum(nn.Module):
    """Features that are linear in all parameters below the head."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 7), nn.Linear(6, 7)
        self.head = nn.Linear(7, OUTPUTS)

    def forward(self, inputs):
        return self.head(self.first(inputs) + self.second(inputs.square()))


def made(asked, start, budget, **kept):
    return forecast_from(
        asked, start, estimator="anchored", budget=budget, samples_new=None, seed=kept.pop("seed", 0),
        on_step=lambda _: None, started=perf_counter(), readings=1, **kept,
    )  # fmt: skip


def at_start(model, old, new, training, head="as_is"):
    asked = given(model, old, new, training, None, None, None)
    return asked, read_start(asked, head)


@pytest.mark.parametrize("training", [RUN, replace(RUN, max_gradient_norm=0.2, weight_decay=0.1)])
def test_of_all_parameters_it_is_the_forecast_itself(training):
    asked, start = at_start(*network_and_task("perceptron", old=30, new=60), training)
    whole = made(asked, start, 0.7)
    same = forecast_within(asked, start, whole)
    assert torch.equal(same.end.theta, whole.end.theta)
    assert torch.equal(same.drift, whole.drift)
    assert whole.relative_drift > 0.01
    assert min(whole._shares) < 1  # of which it believes the same
    assert same.trust == whole.trust
    assert same.share_of_run == pytest.approx(reading_cost(30) / (24 * 10))


def test_features_are_taken_back_to_where_the_others_stand():
    torch.manual_seed(0)
    model = Sum().double()
    _, old, new = network_and_task("perceptron", old=30, new=60)
    asked, start = at_start(model, old, new, RUN)
    whole = made(asked, start, 0.9)
    some = next(each for each in nested(asked.net) if any("second" in name for name in each.parameters))
    small = replace(asked, net=narrowed(asked.net, replace(some, parameters=("second.weight", "second.bias", *HEAD))))
    found = forecast_within(small, start, whole)
    theta = found.end.theta
    assert found._surrogates[-1].step > 0
    for near in found._surrogates:
        inputs = new[0][near.places]
        with torch.no_grad():
            weight, bias = theta[:42].view(7, 6), theta[42:]
            true = model.first(inputs) + inputs.square() @ weight.T + bias
        along = (near.directions * (near.moved(theta) - true)).sum(1)
        assert float(along.abs().max()) < 1e-12
        assert float((near.moved(theta) - near.features).norm()) > 1e-3


HEAD = ("head.weight", "head.bias")


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("name", "head"), [("perceptron", "as_is"), ("adapter", "as_is"), ("lora", "placed")])
def test_shared_anchors_come_nearer_to_the_real_training_than_own_ones(name, head):
    """At equal cost, on average over candidates and draws."""
    model, old, new = network_and_task(name, old=30, new=80)
    asked, start = at_start(model, old, new, RUN, head)
    tried = [replace(asked, net=narrowed(asked.net, each)) for each in halves(asked.net)]
    before = start.old @ asked.net.weight().T + asked.net.bias()
    real = []
    for net in (each.net for each in tried):
        with net.restored():
            end = trained_path(net, asked.new, RUN, [24]).places[24]
            net.put(end.theta, end.weight, end.bias)
            real.append(net.features(asked.old) @ end.weight.T + end.bias - before)
    own, shared = [], []
    for seed in range(3):
        whole = made(asked, start, 0.5, seed=seed)
        for each, drift in zip(tried, real, strict=True):
            own.append(relative_error(made(each, start, 0.25, seed=seed).drift, drift))
            shared.append(relative_error(forecast_within(each, start, whole).drift, drift))
    assert fmean(shared) < fmean(own)


def halves(net):
    """Sets of half of the parameters below the head: the later ones, and the earlier ones."""
    names = list(net.body)
    middle = max(1, len(names) // 2)
    own = {id(parameter) for parameter in net.of_head.values()}
    head = tuple(name for name, parameter in net.model.named_parameters() if id(parameter) in own)
    like = nested(net)[-1]
    return [replace(like, name="late", parameters=(*names[middle:], *head)),
            replace(like, name="early", parameters=(*names[:middle], *head))]  # fmt: skip


def test_the_model_is_left_as_it_is():
    model, old, new = network_and_task("lora", old=30, new=60)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked, start = at_start(model, old, new, RUN)
    forecast_within(replace(asked, net=narrowed(asked.net, halves(asked.net)[0])), start, made(asked, start, 0.6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_is_refused():
    model, old, new = network_and_task("perceptron", old=30, new=60)
    asked, start = at_start(model, old, new, RUN)
    late, early = (replace(asked, net=narrowed(asked.net, each)) for each in halves(asked.net))
    assert contains(asked.net, late.net)
    assert not contains(late.net, asked.net)
    with pytest.raises(ValueError, match="some of"):
        forecast_within(early, start, made(late, start, 0.6))
    pilot = forecast_from(
        asked, start, estimator="pilot", budget=0.6, samples_new=None, seed=0, on_step=lambda _: None, started=0.0
    )
    with pytest.raises(ValueError, match="surrogates of a pilot forecast"):
        forecast_within(late, start, pilot)


@pytest.mark.parametrize("name", ["perceptron", "lora"])
def test_advice_shares_anchors_within_its_budget(name):
    model, old, new = network_and_task(name, old=30, new=120)
    advice = fc.advise(model, old, new, replace(RUN, steps=40), budget=0.45)
    candidates = fc.candidates(model, old)
    assert [point.candidate.name for point in advice.points] == [each.name for each in candidates]
    assert advice.share <= 0.45
    bodies = [point for point in advice.points if point.candidate.name != "head"]
    spent = {point.candidate.name: point.share_of_run for point in bodies}
    assert len(bodies) < 2 or spent["all"] > 2 * max(share for which, share in spent.items() if which != "all")
