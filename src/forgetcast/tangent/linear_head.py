"""The linear head `f = phi W + b` on frozen features, and its bias as one more constant feature."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint, require_finite, require_integer


@dataclass(frozen=True, eq=False)
class LinearHead:
    """A linear head: `logits = phi @ weight + bias`. It holds copies, so later training elsewhere leaves it as it is.

    Args:
        weight: (d, C). Note that `torch.nn.Linear` stores the transpose; `LinearHead.from_module` takes care of it.
        bias: (C,), or None for a head without a bias.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity.

    Examples:
        >>> head = LinearHead.zeros(width=4, outputs=2).grow(3)
        >>> head.width, head.outputs
        (4, 3)
    """

    weight: Any
    bias: Any = None

    def __post_init__(self) -> None:
        weight = torch.as_tensor(self.weight).detach().clone()  # a copy: the module it came from may be trained next
        bias = None if self.bias is None else torch.as_tensor(self.bias).detach().clone()
        if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
            raise complaint(
                f"a head weight of shape {tuple(weight.shape)} and type {weight.dtype}",
                "a floating-point array (d, C)",
                "Give one column an output; for a torch.nn.Linear use LinearHead.from_module.",
            )
        require_finite("head weight", weight)
        if bias is not None:
            if bias.shape != weight.shape[1:] or not bias.is_floating_point():
                raise complaint(
                    f"a head bias of shape {tuple(bias.shape)} and type {bias.dtype} beside a weight of shape "
                    f"{tuple(weight.shape)}",
                    f"a floating-point array ({weight.shape[1]},)",
                    "Transpose the weight if it comes from torch.nn.Linear, or give bias=None.",
                )
            require_finite("head bias", bias)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "bias", bias)

    @staticmethod
    def zeros(width: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> "LinearHead":
        """A head of zeros, the usual start on frozen features."""
        require_integer("width", width, least=1)
        require_integer("outputs", outputs, least=1)
        return LinearHead(torch.zeros(width, outputs, dtype=dtype), torch.zeros(outputs, dtype=dtype) if bias else None)

    @staticmethod
    def from_module(module: nn.Linear) -> "LinearHead":
        """The head that a `torch.nn.Linear` holds (a copy, transposed)."""
        return LinearHead(module.weight.T, module.bias)

    @property
    def width(self) -> int:
        """Feature width d."""
        return int(self.weight.shape[0])

    @property
    def outputs(self) -> int:
        """Number of outputs C."""
        return int(self.weight.shape[1])

    def grow(self, outputs: int) -> "LinearHead":
        """The same head with zero columns appended up to `outputs` columns, for classes to come."""
        extra = outputs - self.outputs
        require_integer("outputs", outputs, least=self.outputs)
        bias = None if self.bias is None else torch.cat([self.bias, self.bias.new_zeros(extra)])
        return LinearHead(torch.cat([self.weight, self.weight.new_zeros(self.width, extra)], 1), bias)

    def logits(self, phi: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """`phi @ weight + bias` in the type of `phi`."""
        return apply_head(self.stacked(), phi)

    def stacked(self) -> Float[Tensor, "d_bias C"]:
        """The weight with the bias as its last row, float64: (d + 1, C), or (d, C) without a bias."""
        rows = [self.weight] if self.bias is None else [self.weight, self.bias[None].to(self.weight)]
        return torch.cat(rows).double()

    def replaced(self, stacked: Float[Tensor, "d_bias C"]) -> "LinearHead":
        """A head of the same kind and type with the values of `stacked`."""
        values = stacked.to(self.weight)
        return LinearHead(values) if self.bias is None else LinearHead(values[:-1], values[-1])


def apply_head(stacked: Float[Tensor, "d_bias C"], phi: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
    """`phi @ W + b` in the type of `phi`, where `stacked` may carry the bias as row d + 1. Cost: 2 n d C."""
    values = stacked.to(phi)
    if len(values) == phi.shape[1]:
        return phi @ values
    return torch.addmm(values[-1], phi, values[:-1])


def with_bias(phi: Float[Tensor, "n d"], rows: int) -> Float[Tensor, "n d_bias"]:
    """`phi`, with a column of ones appended where the stacked head has `rows` = d + 1 rows."""
    return phi if phi.shape[1] == rows else torch.cat([phi, phi.new_ones(len(phi), 1)], 1)


def check_width(name: str, phi: Tensor, head: LinearHead) -> None:
    """Raise unless features and head have the same width."""
    if phi.shape[1] != head.width:
        raise complaint(
            f"{name}: features of shape {tuple(phi.shape)} for a head weight of shape {tuple(head.weight.shape)}",
            f"features (n, {head.width})",
            "Use the features of the layer that feeds this head; a torch.nn.Linear weight must be transposed.",
        )
