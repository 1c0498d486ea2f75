"""The plain linear head."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from forgetcast.checks import require_integer
from forgetcast.heads.base import Head


class Linear(Head):
    """`f(phi) = phi W^T + b`, weight (C, d), bias (C,). New outputs start at zero, so old logits do not notice them.

    Args:
        width: d.
        outputs: C at the start.
        bias: whether there is b.
    """

    def __init__(self, width: int, outputs: int = 0, *, bias: bool = True) -> None:
        super().__init__(width)
        require_integer("outputs", outputs)
        self.weight = nn.Parameter(torch.zeros(outputs, width))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.by_output = ("weight", "bias") if bias else ("weight",)

    def forward(self, phi: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """Logits (n, C). Cost: n d C multiply-adds."""
        return linear(phi, self.weight, self.bias)
