"""Plain fine-tuning of one task after the other: the lower bound, and what protections are added to."""

from collections.abc import Sequence

from torch import Tensor

from forgetcast.checks import require_choice
from forgetcast.methods.base import Batch, Method, Model, Protection, protected_loss


class Sequential(Method):
    """Cross-entropy on the new task, plus what the protections add.

    Args:
        model: backbone and head.
        protections: what keeps old knowledge.
        loss_outputs: the outputs that the softmax of the loss runs over: all "seen", which pushes the old ones down, or
            those of the "task" alone. Prediction is over all seen in both.
    """

    def __init__(self, model: Model, protections: Sequence[Protection] = (), *, loss_outputs: str = "seen") -> None:
        super().__init__(model, protections)
        require_choice("loss_outputs", loss_outputs, ("seen", "task"))
        self.loss_outputs = loss_outputs

    def plain_outputs(self) -> tuple[int, ...] | None:
        """The chosen outputs."""
        return self.seen if self.loss_outputs == "seen" else self.classes

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy over the chosen outputs, plus the protections' terms."""
        outputs = self.seen if self.loss_outputs == "seen" else self.classes
        return protected_loss(self, batch, self.model(batch.inputs), outputs, batch.labels)
