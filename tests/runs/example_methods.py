"""Two methods that the tests of recipes know: one by gradient, one in closed form."""

from collections.abc import Sequence

from torch import Tensor, nn

from forgetcast.methods.base import Batch, Method, Model, Protection, protected_loss


class Plain(Method):
    def __init__(
        self,
        model: Model,
        protections: Sequence[Protection] = (),
        *,
        strength: float = 1.0,
        ranks: tuple[int, ...] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(model, protections)

    def loss(self, batch: Batch) -> Tensor:
        return protected_loss(self, batch, self.model(batch.inputs), self.seen, batch.labels)


class Closed(Plain):
    by_gradient = False

    def __init__(self, backbone: nn.Module, width: int, *, size: int, part: nn.Module | None = None) -> None:
        pass
