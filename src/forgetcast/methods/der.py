"""Dark experience replay: old samples must keep the logits they had when they were seen."""

from forgetcast.methods.base import Model
from forgetcast.methods.sequential import Sequential
from forgetcast.protect.replay import DarkReplay


class DER(Sequential):
    """Fine-tuning with `DarkReplay`, without labels of old samples.

    Args:
        model: backbone and head.
        capacity: samples kept.
        count: old samples drawn for each batch.
        alpha: weight of the squared distance of logits.
        beta: weight of the cross-entropy of old samples; above 0 is DER++.
        loss_outputs: as for `Sequential`.
        seed: of the reservoir.

    Source: arXiv 2004.07211.
    """

    def __init__(
        self,
        model: Model,
        capacity: int = 500,
        count: int = 32,
        *,
        alpha: float = 0.3,
        beta: float = 0.0,
        loss_outputs: str = "seen",
        seed: int = 0,
    ) -> None:
        replay = DarkReplay(capacity, count, alpha=alpha, beta=beta, seed=seed)
        super().__init__(model, [replay], loss_outputs=loss_outputs)


class DERPlusPlus(DER):
    """DER with the labels of old samples too; arguments as there."""

    def __init__(
        self,
        model: Model,
        capacity: int = 500,
        count: int = 32,
        *,
        alpha: float = 0.1,
        beta: float = 0.5,
        loss_outputs: str = "seen",
        seed: int = 0,
    ) -> None:
        super().__init__(model, capacity, count, alpha=alpha, beta=beta, loss_outputs=loss_outputs, seed=seed)
