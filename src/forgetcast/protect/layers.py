"""Linear layers of a model, and what went in and came out of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from forgetcast.checks import complaint
from forgetcast.heads.linear import Linear

LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, Linear)
"""Types of modules that map x to x W^T + b, with `weight` (outputs, inputs) and maybe `bias`."""

Uses = dict[str, list[tuple[Tensor, Tensor]]]


def linear_layers(model: nn.Module, types: Sequence[type[nn.Module]] = LINEAR) -> dict[str, nn.Module]:
    """Modules of these types whose weight trains, by name."""
    kinds: tuple[type[nn.Module], ...] = tuple(types)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: layer for name, layer in linear.items() if weight_of(layer).requires_grad}


@contextmanager
def recorded(layers: Mapping[str, nn.Module]) -> Iterator[Uses]:
    """Inputs and outputs of each layer, for every time it is used inside."""
    uses: Uses = {name: [] for name in layers}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            uses[name].append((inputs[0].detach(), output))
            # an activation that works in place must not reach what is kept
            return output.clone()

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer.

    Raises:
        ValueError: a layer without one.
    """
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise complaint(f"a layer {type(layer).__name__} without a weight", "a linear layer", "Correct `layers`.")
    return weight


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of a linear layer, if it has one."""
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def stacked(layer: nn.Module) -> Tensor:
    """[W b], (outputs, inputs + 1), or W of a layer without bias."""
    bias = bias_of(layer)
    return weight_of(layer) if bias is None else torch.cat([weight_of(layer), bias[:, None]], 1)


def with_one(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs (n, inputs) with a column of ones, or as they are for a layer without bias."""
    return inputs if bias_of(layer) is None else torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
