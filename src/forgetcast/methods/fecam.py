"""FeCAM: Mahalanobis distance to class means, each class with its own covariance."""

from torch import nn

from forgetcast.heads.discriminant import Mahalanobis
from forgetcast.methods.streamed import ClosedForm


class FeCAM(ClosedForm):
    """Mahalanobis distance on frozen features.

    Args:
        backbone: maps inputs to features (n, width).
        width: features a sample.
        power: of Tukey's transform, 0.5 in the paper, for features that are never negative.
        shrinkage: (gamma_1, gamma_2).
        shared: one covariance for all classes, memory 16 width^2 bytes instead of that for each class.

    Source: Goswami et al., NeurIPS 2023 (arXiv 2309.14062).
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        *,
        power: float = 1.0,
        shrinkage: tuple[float, float] = (1.0, 1.0),
        shared: bool = False,
    ) -> None:
        super().__init__(backbone, Mahalanobis(width, power=power, shrinkage=shrinkage, shared=shared))
