"""When a forecast trusts itself, and what it says about it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import NEW, network_and_task
from torch import nn

import forgetcast as fc
from forgetcast.forecast.network.trust import SamplingError

ERRORS = st.none() | st.floats(0, 50)
SAMPLING = st.none() | st.builds(SamplingError, st.floats(0, 50), ERRORS)
MUCH = SamplingError(9.0, 9.0)
CALM = fc.AdamW(5e-4, 20, batch_size=20, classes=NEW)


@given(SAMPLING, ERRORS, st.booleans())
def test_more_error_is_less_trust(sampling, surrogate, degenerate):
    trust = fc.Trust(sampling, surrogate, 0.0, degenerate)
    if sampling is None and surrogate is None:
        assert trust.expected_cosine is None
        assert not trust.trusted
        assert "nothing to check it by" in trust.reason
        return
    cosine = trust.expected_cosine
    assert 0 < cosine <= 1
    assert trust.trusted == (cosine >= 0.8)
    assert f"expected cosine {cosine:.2f}" in trust.reason
    assert trust.trusted == ("not to be trusted (" not in trust.reason)
    assert trust.trusted == ("raise the budget" not in trust.reason)
    assert ("place the head first" in trust.reason) == (degenerate and not trust.trusted)
    more = SamplingError(1 + (0.0 if sampling is None else sampling.all), None)
    for worse in (replace(trust, sampling_error=more), replace(trust, surrogate_error=(surrogate or 0.0) + 1)):
        assert worse.expected_cosine < cosine
    assert (trust.expected_old_cosine is None) == (sampling is None or sampling.old is None)
    if trust.expected_old_cosine is not None:
        of_old = replace(trust, sampling_error=SamplingError(sampling.old, None))
        assert trust.expected_old_cosine == of_old.expected_cosine
        assert f"old classes' own outputs {trust.expected_old_cosine:.2f}" in trust.reason
        assert trust.order_trusted == (trust.expected_old_cosine >= 0.8)
        assert trust.order_trusted == ("which of them suffer most is not to be trusted" not in trust.reason)
    else:
        assert not trust.order_trusted


def test_the_larger_error_is_named():
    few, far = fc.Trust(MUCH, 0.1, 0.0, False), fc.Trust(SamplingError(0.1, 0.1), 3.0, 0.0, False)
    assert "few samples read: raise the budget" in few.reason
    assert "anchors too far apart: raise the budget" in far.reason


def test_what_is_exact_says_so():
    model, old, new = network_and_task("perceptron")
    for settings in ({"budget": 1}, {"budget": 1, "estimator": "pilot"}, {"parameters": ["4.weight", "4.bias"]}):
        found = fc.forecast(model, old, new, CALM, **settings)
        assert (found.trust.exact, found.trust.trusted, found.trust.reason) == (True, True, "exact")
        assert found.trust.expected_cosine == 1
        assert found.interval == (found.accuracy, found.accuracy)


def test_what_cannot_check_itself_is_not_trusted():
    model, old, new = network_and_task("perceptron", new=60)
    for settings in ({"estimator": "pilot", "budget": 0.6}, {"estimator": "static"}):
        training = CALM if settings["estimator"] == "pilot" else fc.GradientDescent(0.01, 5)
        trust = fc.forecast(model, old, new, training, **settings).trust
        assert (trust.exact, trust.trusted, trust.expected_cosine) == (False, False, None)
        assert "nothing to check it by" in trust.reason


@pytest.mark.usefixtures("unchecked_types")
def test_calm_trainings_are_trusted_and_noise_is_not():
    """On most seeds: many samples of a task with little noise; a few of labels that mean nothing, one a batch."""
    calm, noisy = [], []
    for seed in range(3):
        model, old, new = network_and_task("perceptron", old=10, new=60, seed=seed)
        calm.append(fc.forecast(model, old, new, CALM, budget=0.9, seed=seed).trust)
        shuffled = new[0], torch.randint(2, 5, (60,))
        noise = fc.SGD(0.3, 60, batch_size=1, momentum=0.9)
        noisy.append(fc.forecast(model, (old[0][:4], old[1][:4]), shuffled, noise, budget=0.5, seed=seed).trust)
    assert sum(trust.trusted for trust in calm) >= 2
    assert sum(not trust.trusted for trust in noisy) >= 2
    doubted = next(trust for trust in noisy if not trust.trusted)
    assert "not to be trusted (" in doubted.reason
    assert "raise the budget" in doubted.reason


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("value", [0.0, 0.3], ids=["zero rows", "equal rows"])
def test_equal_rows_of_a_fresh_head_are_named(value):
    model, old, new = network_and_task("perceptron", old=10, new=60)
    with torch.no_grad():
        model[4].weight[2:] = value
    found = fc.forecast(model, old, new, CALM, budget=0.9)
    assert found.trust.degenerate
    doubted = replace(found.trust, sampling_error=MUCH)
    assert "raise the budget, or place the head first" in doubted.reason
    placed = fc.forecast(model, old, new, CALM, budget=0.9, head="placed")
    assert not placed.trust.degenerate
    assert "place the head" not in replace(placed.trust, sampling_error=MUCH).reason
    with torch.no_grad():
        model[4].weight[2:] += 0.01 * torch.randn(3, 7)
    assert not fc.forecast(model, old, new, CALM, budget=0.9).trust.degenerate


def test_rows_of_labels_that_do_not_come_may_be_equal():
    model, old, new = network_and_task("perceptron", old=10, new=60)
    with torch.no_grad():
        model[4].weight[:2] = 0
    assert not fc.forecast(model, old, new, CALM, budget=0.9).trust.degenerate


class Silent(nn.Module):
    """An adapter whose both halves are zero: no gradient reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.down, self.up, self.head = nn.Linear(6, 7), nn.Linear(7, 2), nn.Linear(2, 7), nn.Linear(7, 5)
        self.trunk.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return self.head(h + self.up(torch.relu(self.down(h))))


@pytest.mark.parametrize("head", ["as_is", "placed"])
def test_an_adapter_without_a_tangent_is_named(head):
    _, old, new = network_and_task("perceptron", old=10, new=60)
    torch.manual_seed(0)
    model = Silent().double()
    model.up.bias.requires_grad_(False)
    for parameter in (*model.down.parameters(), *model.up.parameters()):
        nn.init.zeros_(parameter)
    trust = fc.forecast(model, old, new, CALM, budget=0.9, head=head).trust
    assert trust.silent
    assert trust.surrogate_error is None  # nothing moves, and rounding is no error
    assert "nothing outside the head has a gradient at the start: initialise it" in trust.reason
    nn.init.normal_(model.down.weight)
    trust = fc.forecast(model, old, new, CALM, budget=0.9, head=head).trust
    assert not trust.silent
    assert "nothing outside" not in trust.reason
