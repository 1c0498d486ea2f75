"""Deep streaming linear discriminant analysis."""

from torch import nn

from forgetcast.heads.discriminant import LinearDiscriminant
from forgetcast.methods.streamed import ClosedForm


class SLDA(ClosedForm):
    """Linear discriminant analysis on frozen features.

    Args:
        backbone: maps inputs to features (n, width).
        width: features a sample.
        shrinkage: of the shared covariance, in [0, 1].
        priors: whether frequent classes are preferred.

    Source: Hayes & Kanan, CVPR Workshops 2020 (arXiv 1909.01520).
    """

    def __init__(self, backbone: nn.Module, width: int, *, shrinkage: float = 1e-4, priors: bool = False) -> None:
        super().__init__(backbone, LinearDiscriminant(width, shrinkage=shrinkage, priors=priors))
