"""Elastic weight consolidation: hold each weight as firmly as the old tasks' Fisher asks."""

from forgetcast.methods.base import Model
from forgetcast.methods.sequential import Sequential
from forgetcast.protect.importance import FisherPenalty
from forgetcast.protect.kronecker import KroneckerPenalty


class EWC(Sequential):
    """Fine-tuning under a `FisherPenalty`.

    Args:
        model: backbone and head.
        strength: lambda.
        fisher: "exact", "sampled" or "empirical".
        decay: gamma of online EWC; None is the offline form.
        samples: read at most that many samples a task for the Fisher.
        loss_outputs: as for `Sequential`.
        seed: of sampled labels.

    Source: arXiv 1612.00796; online form arXiv 1805.06370.
    """

    def __init__(
        self,
        model: Model,
        strength: float = 100.0,
        *,
        fisher: str = "exact",
        decay: float | None = None,
        samples: int | None = None,
        loss_outputs: str = "seen",
        seed: int = 0,
    ) -> None:
        penalty = FisherPenalty(strength, fisher=fisher, decay=decay, samples=samples, seed=seed)
        super().__init__(model, [penalty], loss_outputs=loss_outputs)


class KroneckerEWC(Sequential):
    """Fine-tuning under a `KroneckerPenalty`.

    Args:
        model: backbone and head.
        strength: lambda.
        fisher: "exact", "sampled" or "empirical".
        loss_outputs: as for `Sequential`.
        seed: of sampled labels.

    Source: arXiv 1805.07810.
    """

    def __init__(
        self,
        model: Model,
        strength: float = 100.0,
        *,
        fisher: str = "exact",
        loss_outputs: str = "seen",
        seed: int = 0,
    ) -> None:
        super().__init__(model, [KroneckerPenalty(strength, fisher=fisher, seed=seed)], loss_outputs=loss_outputs)
