"""Evaluation and training mode of a whole model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
