"""Under autocast a frozen weight is cast once a step, and an activation once for all layers that read it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


class CastOnce(TorchFunctionMode):
    """While it is entered, linear layers share one cast of each frozen weight, and of what several of them read.

    Autocast keeps the casts of weights that train. Frozen ones it casts anew in each pass, and a graph holds on to each
    of these copies: a step that goes through a model four times, twice with a gradient, casts them four times and
    holds them twice. What query, key and value read it casts three times, and its gradients three times back. Answers
    stay as they are; so do gradients, but that those of layers that read the same are added up before they are cast.

    Memory: one copy of each frozen weight in half precision, and of the last activation, until it is left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, tuple[Tensor, int, Tensor]] = {}
        self.read: tuple[Tensor, int, bool, Tensor] | None = None

    def __exit__(self, *given: Any) -> None:
        self.read = None
        super().__exit__(*given)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear and len(args) > 1:
            return linear(self._activation(args[0]), self._weight(args[1]), *args[2:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _weight(self, weight: Tensor) -> Tensor:
        frozen = isinstance(weight, nn.Parameter) and not weight.requires_grad
        if not frozen or not _to_cast(weight):
            return weight
        _, version, cast = self.casts.get(id(weight), (weight, -1, weight))
        if version != weight._version:
            cast = weight.to(torch.get_autocast_dtype(weight.device.type))
            self.casts[id(weight)] = weight, weight._version, cast
        return cast

    def _activation(self, given: Tensor) -> Tensor:
        if not _to_cast(given):
            return given
        graph = torch.is_grad_enabled()
        if self.read is None or self.read[0] is not given or self.read[1:3] != (given._version, graph):
            cast = given.to(torch.get_autocast_dtype(given.device.type))
            self.read = given, given._version, graph, cast
        return self.read[3]


def _to_cast(given: Tensor) -> bool:
    apart = given.is_inference() or torch.is_inference_mode_enabled()  # a graph cannot hold what is made there
    return given.dtype == torch.float32 and not apart and torch.is_autocast_enabled(given.device.type)
