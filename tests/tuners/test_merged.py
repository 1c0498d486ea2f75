"""Adapters that are merged while they train, against the closed form of all their steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_expandable import made
from torch import Tensor

from forgetcast.tuners.expandable import Expandable
from forgetcast.tuners.merged import begin_as_before, merge


def flat(adapters) -> Tensor:
    return torch.cat([value.detach().flatten() for value in adapters.parameters()])


def stepped(network: Expandable, draw: torch.Generator) -> Tensor:
    """One step of an optimiser, whatever it was."""
    step = torch.randn(len(flat(network.newest)), generator=draw, dtype=torch.float64)
    places = iter(step.split([value.numel() for value in network.newest.parameters()]))
    with torch.no_grad():
        for value in network.newest.parameters():
            value += next(places).view_as(value)
    return step


@pytest.mark.parametrize("settled", [0, 1, 3])
def test_new_adapters_begin_as_those_before_and_train(settled):
    network = made("vit", settled)
    begin_as_before(network)
    assert all(value.requires_grad for value in network.newest.parameters())
    if settled:
        assert torch.equal(flat(network.newest), flat(network.settled[-1]))
        stepped(network, torch.Generator().manual_seed(0))  # a copy: the one before stays
        assert not torch.equal(flat(network.newest), flat(network.settled[-1]))


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(1, 3), st.integers(0, 6))
def test_merged_adapters_equal_their_closed_form(momentum, settled, count):
    network, draw = made("vit", settled), torch.Generator().manual_seed(count)
    old = [flat(adapters) for adapters in network.settled]
    begin_as_before(network)
    steps = []
    for _ in range(count):
        steps.append(stepped(network, draw))
        merge(network, momentum)
    mean, kept = torch.stack(old).mean(0), 1 - momentum
    expected = mean + kept**count * (old[-1] - mean)
    expected = expected + sum(kept ** (count - k) * step for k, step in enumerate(steps))
    torch.testing.assert_close(flat(network.newest), expected)
    assert all(torch.equal(flat(one), before) for one, before in zip(network.settled, old, strict=True))


def test_the_first_adapters_and_none_at_all_are_left_alone():
    network = made("vit", 0)
    merge(network, 0.5)
    begin_as_before(network)
    before = flat(network.newest)
    merge(network, 0.5)
    assert torch.equal(flat(network.newest), before)
