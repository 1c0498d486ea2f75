"""Gradient projection for parameter-efficient tuning: steps that leave old answers alone."""

from typing import Literal

from forgetcast.checks import require_choice
from forgetcast.methods.base import Model, Protection
from forgetcast.methods.sequential import Sequential
from forgetcast.protect.projected import GradientProjection, StandingRows
from forgetcast.protect.projection import Blend
from forgetcast.protect.restraint import Target
from forgetcast.protect.spaces import Energy
from forgetcast.tuners.base import Conditions

HEADS = ("rows", "free", "projected")


class PEGP(Sequential):
    """Fine-tuning of a tuner under `GradientProjection`.

    Args:
        model: backbone with a tuner in place, and head.
        threshold: epsilon, the share of each task's energy that is protected.
        strength: rho: 1 forbids the old directions, less slows steps along them.
        energy: what epsilon is a share of: "sigma2", the energy of the activations; "sigma4", as released codes.
        blend: how a strength below 1 mixes: "projector", or "normalised", as NSP^2's code.
        conditions: "corrected", which is exact; "paper", as its equations have them.
        target: what is projected: the "step", or the "gradient" as in the paper.
        head: what protects the head, which the paper leaves "free": "rows" of old outputs stand still
            (`StandingRows`); "projected", its steps are projected as a tuner's are, and old rows may move where no old
            feature is.
        loss_outputs: as for `Sequential`.

    Source: arXiv 2405.13383, with the step projected instead of the gradient.
    """

    needs_tuner = True

    def __init__(
        self,
        model: Model,
        threshold: float = 0.95,
        *,
        strength: float = 1.0,
        energy: Energy = "sigma2",
        blend: Blend = "projector",
        conditions: Conditions = "corrected",
        target: Target = "step",
        head: Literal["rows", "free", "projected"] = "rows",
        loss_outputs: str = "seen",
    ) -> None:
        require_choice("head", head, HEADS)
        projection = GradientProjection(
            threshold,
            strength=strength,
            energy=energy,
            blend=blend,
            conditions=conditions,
            target=target,
            head=head == "projected",
        )
        protections: list[Protection] = [projection, *([StandingRows()] if head == "rows" else [])]
        super().__init__(model, protections, loss_outputs=loss_outputs)
