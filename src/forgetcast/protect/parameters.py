"""What protections share: the parameters that train, blocks of grown ones, and the evaluation mode."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that have `requires_grad`, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def leading(values: Tensor, shape: Sequence[int]) -> Tensor:
    """The block `values[:shape[0], :shape[1], ...]`: what a grown parameter held before. A view."""
    return values[tuple(slice(size) for size in shape)]


def padded(values: Tensor, shape: Sequence[int]) -> Tensor:
    """`values` as the leading block of zeros of a larger shape."""
    result = values.new_zeros(tuple(shape))
    leading(result, values.shape).copy_(values)
    return result


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, running statistics) inside; each module's own mode is restored after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def training_mode(model: nn.Module) -> None:
    """Training mode, but for batch normalisations with weights of which none trains: their statistics stand still too.

    Statistics that move under frozen weights change what a frozen part computes. Without weights of its own a
    normalisation counts as part of what trains.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = list(module.parameters(recurse=False))
            module.train(module.training and (not own or any(parameter.requires_grad for parameter in own)))


def chosen_rows(length: int, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` of `length` rows, drawn without replacement."""
    return torch.randperm(length, generator=generator)[:count]
