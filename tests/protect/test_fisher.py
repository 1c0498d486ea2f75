"""Squared gradients of single samples against autograd, one sample and one score at a time, on awkward modules."""

import pytest
import torch
from torch import nn

from forgetcast.heads.linear import Linear
from forgetcast.methods.base import Model
from forgetcast.protect.fisher import squared_gradients
from forgetcast.protect.parameters import trainable


class Tokens(nn.Module):
    """Two positions a sample, mixed by a mean."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(2, 4), nn.Linear(4, 5, bias=False)

    def forward(self, x):
        return self.out(self.into(x.reshape(len(x), 2, 2)).tanh()).mean(1)


class Twice(nn.Module):
    """One layer used two times, and one whose weight is another's too."""

    def __init__(self):
        super().__init__()
        self.layer, self.tied, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5)
        self.other = nn.Linear(4, 4)
        self.other.weight = self.tied.weight

    def forward(self, x):
        return self.out(self.other(self.tied(self.layer(self.layer(x).tanh()).tanh()).tanh()))


class PositionsFirst(nn.Module):
    """The first axis that the layer sees is not the sample."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(2, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.out(self.layer(x.reshape(len(x), 2, 2).transpose(0, 1)).tanh().sum(0))


class Doubled(nn.Linear):
    """Looks like a linear layer and is none."""

    def forward(self, x):
        return super().forward(x).square()


def frozen_weight():
    layer = nn.Linear(4, 5)
    layer.weight.requires_grad_(False)
    return layer


def frozen_bias():
    layer = nn.Linear(4, 5)
    layer.bias.requires_grad_(False)
    return nn.Sequential(layer, nn.ReLU(inplace=True))


ZOO = {
    "network": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU()),
    "norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)),
    "tokens": Tokens,
    "twice": Twice,
    "positions first": PositionsFirst,
    "not linear": lambda: Doubled(4, 5),
    "frozen weight": frozen_weight,
    "frozen bias": frozen_bias,
    "frozen": lambda: nn.Linear(4, 5).requires_grad_(False),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(6, 5)),
}


@pytest.mark.parametrize("build", ZOO.values(), ids=ZOO)
@pytest.mark.parametrize("scores", [1, 3])
@pytest.mark.parametrize("rows", [2, 7])
def test_they_are_those_of_autograd(build, scores, rows):
    torch.manual_seed(0)
    model = Model(build(), Linear(5, 3)).double().eval()
    nn.init.normal_(model.head.weight)
    x, r = torch.randn(rows, 4).double(), torch.randn(scores, rows, 3).double()
    expected = {name: torch.zeros_like(parameter) for name, parameter in trainable(model).items()}
    for n in range(len(x)):
        for score in r:
            value = (model(x[n : n + 1])[0] * score[n]).sum()
            gradients = torch.autograd.grad(value, list(trainable(model).values()))
            for name, gradient in zip(expected, gradients, strict=True):
                expected[name] += gradient.square()
    found = squared_gradients(model, x, r, samples_at_once=3)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)
