"""Backbones of the tests for methods that are about a tuner."""

from torch import nn

from forgetcast.methods.registry import needs_tuner
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.anatomy import Anatomy, Block


def tuned_where_needed(name: str, backbone: nn.Sequential, width: int) -> nn.Sequential:
    """The backbone, with an adapter beside its first two layers for a method that needs one."""
    if needs_tuner(name):
        backbone.append(nn.Linear(width, width))
        Adapter(rank=16).attach(backbone, Anatomy((Block("", "0", str(len(backbone) - 1)),)))
        nn.init.normal_(backbone[-1].adapter.up.weight, std=0.1)
    return backbone
