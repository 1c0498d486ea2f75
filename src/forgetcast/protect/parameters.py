"""What protections share: the parameters that train, blocks of grown ones, and draws of rows."""

from collections.abc import Sequence

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


def chosen_rows(length: int, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` of `length` rows, drawn without replacement."""
    return torch.randperm(length, generator=generator)[:count]
