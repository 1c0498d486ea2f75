"""What trains of a backbone: nothing moves of a frozen one, all that is reached trains, patterns choose by name."""

import pytest
import torch
from torch import nn

from forgetcast.backbones.trainable import Frozen, choose_trainable

INPUTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Two layers, dropout, running statistics, and a part that no feature depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.normal = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(5, 2)
        self.pooler = nn.Linear(5, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(self.normal(self.first(inputs))))


def names_that_train(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_a_frozen_backbone_stays_as_it_is():
    network = Network()
    expected = network.eval()(INPUTS).detach()
    frozen = choose_trainable(network, network, "none", INPUTS)
    assert isinstance(frozen, Frozen)
    whole = nn.Sequential(frozen, nn.Linear(2, 2)).train()
    assert not any(part.training for part in frozen.modules())
    assert torch.equal(whole[0](INPUTS), expected)
    whole(INPUTS).sum().backward()
    assert names_that_train(frozen) == set()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert network.normal.num_batches_tracked == 0


def test_all_is_what_the_features_depend_on():
    network = Network().train()
    state = torch.get_rng_state()
    chosen = choose_trainable(network, network, "all", INPUTS)
    assert chosen is network
    assert names_that_train(network) == {
        name for name, _ in network.named_parameters() if not name.startswith("pooler")
    }
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert network.normal.num_batches_tracked == 0


def test_patterns_match_the_names_of_the_network_within():
    network = Network().requires_grad_(False)
    around = nn.Sequential(network, nn.Linear(2, 2))
    choose_trainable(around, network, ["second.*", "*.bias"], INPUTS)
    assert names_that_train(network) == {"second.weight", "second.bias", "first.bias", "normal.bias", "pooler.bias"}


def test_what_cannot_train_is_refused():
    network = Network()
    with pytest.raises(
        ValueError, match=r"the pattern 'secnd.\*' matches no parameter; expected names such as \['second"
    ):
        choose_trainable(network, network, ["secnd.*"], INPUTS)
    with pytest.raises(ValueError, match="a backbone without parameters; expected some to train"):
        choose_trainable(nn.Flatten(), nn.Flatten(), "all", INPUTS)
