"""A linear head on a frozen backbone, trained by gradient."""

from torch import Tensor

from forgetcast.methods.base import Batch, Model
from forgetcast.methods.sequential import Sequential


class Probe(Sequential):
    """Cross-entropy for the head alone; the features never change.

    Args:
        model: backbone and head; the backbone's `requires_grad` is switched off.
        loss_outputs: as for `Sequential`.
    """

    def __init__(self, model: Model, *, loss_outputs: str = "seen") -> None:
        super().__init__(model, loss_outputs=loss_outputs)
        model.backbone.requires_grad_(False)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy on features of the backbone in evaluation mode."""
        # in training mode its dropout would act, and running statistics would move although nothing trains
        self.model.backbone.eval()
        return super().loss(batch)
