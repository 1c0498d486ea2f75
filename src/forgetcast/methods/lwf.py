"""Learning without forgetting: the new task's samples must keep the old outputs they had."""

from forgetcast.methods.base import Model
from forgetcast.methods.sequential import Sequential
from forgetcast.protect.distill import Distillation


class LwF(Sequential):
    """Fine-tuning under `Distillation`.

    Args:
        model: backbone and head.
        strength: weight of the distillation.
        temperature: T of the softened form.
        form: "softened" or "logits".
        loss_outputs: as for `Sequential`; the paper's is "task".

    Source: arXiv 1606.09282.
    """

    def __init__(
        self,
        model: Model,
        strength: float = 1.0,
        *,
        temperature: float = 2.0,
        form: str = "softened",
        loss_outputs: str = "task",
    ) -> None:
        super().__init__(model, [Distillation(strength, temperature=temperature, form=form)], loss_outputs=loss_outputs)
