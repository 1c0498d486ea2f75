"""Attention in bfloat16 on a CPU: two products and a softmax, where PyTorch's fused kernel is slower than they are."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

LONGEST = 512
"""Tokens up to which the matrix of their products is formed."""


class PlainAttention(TorchFunctionMode):
    r"""While it is entered, attention of bfloat16 tensors on a CPU that is to have a gradient goes the plain way.

        softmax(s Q K^T) V,        s = 1 / sqrt(d)

    That is, a `scaled_dot_product_attention` without mask or dropout, of at most `LONGEST` tokens. Measured with 197
    tokens and heads of 64: forward and backward half the time of the fused kernel, for n heads t^2 numbers more;
    forward alone the kernel takes two thirds of the time, and is left to it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return _attended(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attended(
    query: Tensor, key: Tensor, value: Tensor, *others: Any, scale: float | None = None, **more: Any
) -> Tensor:
    asked = any(isinstance(one, Tensor) or one for one in (*others, *more.values()))
    if asked or not _goes_plainly(query, key, value):
        return scaled_dot_product_attention(query, key, value, *others, **{**more, "scale": scale})
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    rows, columns, values = (part.reshape(-1, *part.shape[-2:]) for part in (query, key, value))
    products = torch.baddbmm(rows.new_zeros(1, 1, 1), rows, columns.mT, beta=0, alpha=factor)
    return (products.softmax(-1) @ values).view(*query.shape[:-1], value.shape[-1])


def _goes_plainly(query: Tensor, key: Tensor, value: Tensor) -> bool:
    parts = query, key, value
    backward = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    alike = query.ndim > 2 and all(part.shape[:-2] == query.shape[:-2] for part in parts)
    known = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return backward and alike and known and key.shape[-2] <= LONGEST
