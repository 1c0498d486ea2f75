"""One cast of each frozen weight a step, and of what several layers read: the same numbers, nothing stale."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from forgetcast.learn.casts import CastOnce
from forgetcast.learn.step import precision_of


class Casts(TorchDispatchMode):
    """Counts casts of matrices of a shape to bfloat16."""

    def __init__(self, *shape: int):
        super().__init__()
        self.count, self.shape = 0, shape or (12, 12)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.shape == self.shape:
            self.count += found.dtype == torch.bfloat16
        return found


def network() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
    for place in (0, 2):
        made[place].requires_grad_(False)
    return made


def passes(model: nn.Module, mode, count: int = 4) -> tuple[list[torch.Tensor], int]:
    """What several passes give, and the gradient; and the casts of weights."""
    x = torch.linspace(-1, 1, 60).view(5, 12)
    model.zero_grad()
    with Casts() as casts, torch.autocast("cpu", torch.bfloat16), mode:
        found = [model(x) for _ in range(count)]
        sum(each.float().square().sum() for each in found).backward()
    return [*(each.detach() for each in found), model[1].weight.grad, model[1].bias.grad], casts.count


def test_the_numbers_are_those_of_autocast_at_a_cast_a_weight():
    model = network()
    plain, often = passes(model, torch.enable_grad())
    once, seldom = passes(model, CastOnce())
    assert all(torch.equal(one, other) for one, other in zip(once, plain, strict=True))
    assert (often, seldom) == (2 * 4 + 1, 3)


def test_a_weight_that_is_changed_is_cast_again():
    model, mode = network(), CastOnce()
    x = torch.ones(1, 12)
    with torch.autocast("cpu", torch.bfloat16), mode:
        first = model(x)
        with torch.no_grad():
            model[0].weight.add_(1.0)
        second = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(second, model(x))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_autocast_and_in_double_nothing_is_cast(dtype):
    model, x = network().to(dtype), torch.ones(2, 12, dtype=dtype)
    with CastOnce() as mode:
        assert torch.equal(model(x), network().to(dtype)(x))
    assert not mode.casts


def test_weights_by_name_and_of_inference_are_left_alone():
    with torch.inference_mode():
        model = nn.Linear(12, 12)
    x = torch.ones(2, 12)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), CastOnce() as mode:
        given = nn.functional.linear(x, weight=network()[0].weight)
        model(x)
    assert given.dtype == torch.bfloat16
    assert not mode.casts


def test_a_pass_of_inference_leaves_nothing_that_a_graph_cannot_hold():
    model, x = network(), torch.ones(2, 12)
    with torch.autocast("cpu", torch.bfloat16), CastOnce():
        with torch.inference_mode():
            model(x)
        model(x).float().sum().backward()
    assert float(model[1].weight.grad.norm()) > 0


@pytest.mark.usefixtures("unchecked_types")  # an Accelerator has the precision of the first one of its process
def test_a_step_in_bfloat16_casts_once():
    accelerator = SimpleNamespace(mixed_precision="bf16", autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    model = network()
    with Casts() as casts, precision_of(accelerator):
        model(torch.ones(2, 12))
        model(torch.ones(2, 12))
    assert casts.count == 3


def three(mode, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """What three layers give that read the same, and its gradient; and the casts of what they read."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 6).requires_grad_(False) for _ in range(3)]
    hidden = x.clone().requires_grad_() * 1.0
    hidden.retain_grad()
    with Casts(5, 12) as casts, torch.autocast("cpu", torch.bfloat16), mode:
        found = [layer(hidden) for layer in layers]
        sum(each.float().square().sum() for each in found).backward()
    return [each.detach() for each in found], hidden.grad, casts.count


def test_what_three_layers_read_is_cast_once():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    plain, gradient, often = three(torch.enable_grad(), x)
    once, summed, seldom = three(CastOnce(), x)
    assert (often, seldom) == (3, 1)
    assert all(torch.equal(one, other) for one, other in zip(once, plain, strict=True))
    assert (summed - gradient).norm() < 0.01 * gradient.norm()


def test_a_cast_without_a_graph_is_not_read_with_one():
    x = torch.randn(5, 12, requires_grad=True)
    layer, mode = nn.Linear(12, 6), CastOnce()
    with torch.autocast("cpu", torch.bfloat16), mode:
        with torch.no_grad():
            layer(x)
        layer(x).float().sum().backward()
        assert mode.read is not None
    assert float(x.grad.norm()) > 0
    assert mode.read is None  # nor held longer than needed


def test_an_activation_that_is_changed_is_cast_again():
    x, layer = torch.ones(5, 12), nn.Linear(12, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), CastOnce():
        first = layer(x)
        x.mul_(2.0)
        second = layer(x)
    assert not torch.equal(first, second)
