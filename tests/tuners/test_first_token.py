"""The last feed-forward network for the first token alone: the same feature and gradients, where no other counts."""

from functools import partial

import pytest
import torch
from test_stream import LENGTH, TOKENS, WIDTH, First, begun, drawn, inputs, parts_of, plain, vit
from torch import nn
from tuned_models import FusedModel

from forgetcast.tuners.anatomy import anatomy
from forgetcast.tuners.first_token import FirstToken, reads_first_token_alone
from forgetcast.tuners.generated import Generator, Inserted
from forgetcast.tuners.stream import Pass, Stream


class Mean(nn.Module):
    """The mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model = FusedModel().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).mean(1)


class Near(nn.Module):
    """All but nothing of another token."""

    def __init__(self) -> None:
        super().__init__()
        self.model = FusedModel().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.model(x)
        return found[:, 0] + 1e-30 * found[:, 1]


@pytest.mark.parametrize(("make", "alone"), [(vit, True), (plain, True), (Mean, False), (Near, False)])
def test_whether_a_model_reads_other_tokens(make, alone):
    torch.manual_seed(0)
    model = make()
    x = inputs("vit" if make is vit else "plain", 2)
    assert reads_first_token_alone(model, anatomy(model), x) == alone
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["added", "read", "inserted"])
@pytest.mark.parametrize("make", [vit, plain])
def test_the_feature_and_its_gradients_are_those_of_all_tokens(make, kind):
    model = make().double().requires_grad_(False)
    x = inputs("vit" if make is vit else "plain").double()
    parts = drawn(parts_of(kind)).double()
    stream = Stream(model, anatomy(model))
    goal = torch.randn(len(x), WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ends = []
    for wrapped in (lambda one: one, partial(FirstToken, last=1)):
        parts.zero_grad()
        with stream.along(wrapped(begun(kind, parts))):
            found = model(x)
        (found - goal).square().sum().backward()
        ends.append((found.detach(), [value.grad.clone() for value in parts.parameters()]))
    (whole, gradients), (alone, own) = ends
    assert float((whole - model(x)).norm()) > 1e-3
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)
    for one, other in zip(own, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_last_network_reads_one_row_a_sample():
    model, x = plain(), inputs("plain")
    rows = []
    where = anatomy(model)
    for block in where.blocks:
        model.get_submodule(block.enter).register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[:-1]))
    with Stream(model, where).along(FirstToken(Pass(), 1)):
        model(x)
    assert rows == [(4, TOKENS), (4, 1)]


def test_in_a_model_of_one_block_inserted_prompts_are_left_out():
    torch.manual_seed(0)
    model = First(FusedModel().eval())
    model.model.blocks = model.model.blocks[:1]
    x = inputs("plain")
    parts = drawn(nn.ModuleList([Generator(TOKENS, LENGTH, WIDTH, zero=True)]))
    stream = Stream(model, anatomy(model))
    ends = []
    for wrapped in (lambda one: one, partial(FirstToken, last=0)):
        with stream.along(wrapped(Inserted(parts, LENGTH, 0.1))):
            ends.append(model(x))
    torch.testing.assert_close(ends[1], ends[0])
