"""How much a forecast owes to the samples that it happened to read."""

from importlib import import_module

import pytest
import torch
from small_networks import NEW, network_and_task
from torch import nn

import forgetcast as fc
from forgetcast.forecast.network.trust import SamplingError

TRAINING = fc.AdamW(2e-3, 60, batch_size=16, classes=NEW)


def task(count: int, seed: int) -> tuple[nn.Module, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """A network and new classes that overlap, so that samples differ in what they ask for."""
    model, old, _ = network_and_task("perceptron", old=40, seed=seed)
    torch.manual_seed(seed)
    labels = torch.arange(count) % 3 + 2
    inputs = torch.randn(3, 6).double()[labels - 2] + 1.5 * torch.randn(count, 6).double()
    return model, old, (inputs, labels)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("head", ["as_is", "placed"])
def test_halves_share_no_samples_and_each_sees_every_class(head, monkeypatch):
    """An anchor's samples lie class by class: every other one of them would be of every other class."""
    module = import_module("forgetcast.forecast.network.sampling")
    halves, follow = [], module.follow

    def seen(net, training, start, surrogates, *given, **named):
        halves.append(surrogates)
        return follow(net, training, start, surrogates, *given, **named)

    monkeypatch.setattr(module, "follow", seen)
    model, old, new = task(900, 0)
    found = fc.forecast(model, old, new, TRAINING, budget=0.3, head=head)
    first, second = (torch.cat([near.places for near in half]).tolist() for half in halves)
    taken = torch.cat([near.places for near in found._surrogates]).tolist()
    assert sorted(first + second) == sorted(taken)
    assert abs(len(first) - len(second)) <= 16  # one anchor or two, of which one may take a sample twice
    for half in halves:
        counts = torch.cat([near.objective.targets for near in half]).bincount()[2:].double()
        assert float((counts / counts.sum() - 1 / 3).abs().max()) < 0.1


@pytest.mark.usefixtures("unchecked_types")
def test_it_tells_how_far_other_draws_lead():
    """Root mean square over draws of the distance from their mean, against what each draw says of itself."""
    told, measured = [], []
    for seed in range(2):
        model, old, new = task(900, seed)
        found = [fc.forecast(model, old, new, TRAINING, budget=0.3, seed=draw) for draw in range(5)]
        drifts = torch.stack([forecast.drift for forecast in found])
        centre = drifts.mean(0)
        spread = float((drifts - centre).square().sum((1, 2)).mean() * 5 / 4) ** 0.5
        measured.append(spread / float(centre.norm()))
        told.append(sum(forecast.trust.sampling_error.all for forecast in found) / 5)
    ratio = sum(told) / sum(measured)
    assert 0.7 < ratio < 1.4, (told, measured)


def test_samples_that_are_all_alike_leave_nothing_to_chance():
    model, old, new = task(90, 0)
    same = new[0][:1].expand(90, -1).clone(), new[1][:1].expand(90).clone()
    trust = fc.forecast(model, old, same, TRAINING, budget=0.3).trust
    assert trust.sampling_error.all == pytest.approx(0, abs=0.05)
    assert trust.trusted
    assert fc.forecast(model, old, new, TRAINING, budget=0.3).trust.sampling_error.all > 0.1


@pytest.mark.usefixtures("unchecked_types")
def test_the_old_outputs_have_an_error_of_their_own():
    """Above that of the whole drift, most of which is in new outputs; none without labels, or where outputs stand."""
    model, old, new = task(900, 0)
    found = fc.forecast(model, old, new, TRAINING, budget=0.3)
    error = found.trust.sampling_error
    assert found.drift[:, :2].norm() < found.drift[:, 2:].norm()
    assert error.old > error.all
    assert fc.forecast(model, old[0], new, TRAINING, budget=0.3).trust.sampling_error == SamplingError(error.all, None)
    rare = (torch.arange(40) == 1).long()  # of a class that no sample read for the halves has
    assert fc.forecast(model, (old[0], rare), new, TRAINING, budget=0.3).trust.sampling_error == error
