"""Synaptic intelligence: hold each weight by how much it helped while it was learnt."""

from forgetcast.methods.base import Model
from forgetcast.methods.sequential import Sequential
from forgetcast.protect.importance import PathPenalty


class SI(Sequential):
    """Fine-tuning under a `PathPenalty`.

    Args:
        model: backbone and head.
        strength: c.
        damping: xi.
        loss_outputs: as for `Sequential`.

    Source: arXiv 1703.04200.
    """

    def __init__(
        self, model: Model, strength: float = 1.0, *, damping: float = 0.1, loss_outputs: str = "seen"
    ) -> None:
        super().__init__(model, [PathPenalty(strength, damping=damping)], loss_outputs=loss_outputs)
