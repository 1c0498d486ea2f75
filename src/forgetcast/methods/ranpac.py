"""RanPAC: random features, and ridge regression whose penalty is chosen on training data."""

from collections.abc import Sequence

from torch import nn

from forgetcast.heads.projection import RandomProjection
from forgetcast.heads.ridge import RecursiveRidge
from forgetcast.methods.streamed import ClosedForm

PENALTIES = tuple(10.0**power for power in range(-8, 10))


class RanPAC(ClosedForm):
    """Random projection with a ReLU, then ridge regression. Any later task may change the penalty in force.

    Args:
        backbone: maps inputs to features (n, width).
        width: features a sample.
        size: random features, 10,000 in the paper; memory is 16 size^2 bytes.
        seed: of the projection.
        penalties: the grid; the choice and its errors are in `head.penalty` and `head.errors`.

    Source: McDonnell et al., NeurIPS 2023 (arXiv 2307.02251), algorithm 1, without its first-session adaptation.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        *,
        size: int = 2000,
        seed: int = 0,
        penalties: Sequence[float] = PENALTIES,
    ) -> None:
        projection = RandomProjection(width, size, seed)
        super().__init__(nn.Sequential(backbone, projection), RecursiveRidge(size, penalty=tuple(penalties)))
