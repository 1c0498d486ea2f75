"""A linear head on a frozen backbone, held along the vulnerable modes of earlier tasks."""

from forgetcast.methods.base import Model
from forgetcast.methods.probe import Probe
from forgetcast.protect.spectral_head import SpectralHead


class Spectral(Probe):
    """A frozen probe under `SpectralHead`.

    Args:
        model: backbone and head; the backbone's `requires_grad` is switched off.
        strength: weight of the penalty.
        modes: sample modes held for each task.
        loss_outputs: as for `Sequential`.

    Source: arXiv 2606.18024.
    """

    def __init__(self, model: Model, strength: float = 1.0, modes: int = 64, *, loss_outputs: str = "seen") -> None:
        super().__init__(model, loss_outputs=loss_outputs)
        self.protections = (SpectralHead(strength, modes),)
