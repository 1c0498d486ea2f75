"""Under autocast a frozen weight is cast once a step, and not in every pass through it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


class CastOnce(TorchFunctionMode):
    """While it is entered, linear layers share one cast of each frozen weight; answers and gradients stay as they are.

    Autocast keeps the casts of weights that train. Frozen ones it casts anew in each pass, and a graph holds on to each
    of these copies: a step that goes through a model four times, twice with a gradient, casts them four times and
    holds them twice.

    Memory: one copy of each frozen weight in half precision, until it is left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, tuple[Tensor, int, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear and len(args) > 1:
            return linear(args[0], self._cast(args[1]), *args[2:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _cast(self, weight: Tensor) -> Tensor:
        device = weight.device.type
        frozen = isinstance(weight, nn.Parameter) and not weight.requires_grad and weight.dtype == torch.float32
        apart = weight.is_inference() or torch.is_inference_mode_enabled()  # a graph cannot hold what is made there
        if not frozen or apart or not torch.is_autocast_enabled(device):
            return weight
        _, version, cast = self.casts.get(id(weight), (weight, -1, weight))
        if version != weight._version:
            cast = weight.to(torch.get_autocast_dtype(device))
            self.casts[id(weight)] = weight, weight._version, cast
        return cast
