"""RanPAC: random features, and ridge regression whose penalty is chosen on training data."""

from collections.abc import Sequence

from torch import nn

from forgetcast.heads.projection import RandomProjection
from forgetcast.heads.ridge import RecursiveRidge
from forgetcast.methods.session import FirstSession

PENALTIES = tuple(10.0**power for power in range(-8, 10))


class RanPAC(FirstSession):
    """Random projection with a ReLU, then ridge regression. Any later task may change the penalty in force.

    Args:
        backbone: maps inputs to features (n, width).
        width: features a sample.
        size: random features, 10,000 in the paper; memory is 16 size^2 bytes.
        seed: of the projection.
        penalties: the grid; the choice and its errors are in `head.penalty` and `head.errors`.
        first_session: whether what trains of the backbone adapts to the first task, as in the paper.

    Source: McDonnell et al., NeurIPS 2023 (arXiv 2307.02251), algorithm 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        *,
        size: int = 2000,
        seed: int = 0,
        penalties: Sequence[float] = PENALTIES,
        first_session: bool = False,
    ) -> None:
        ridge, projection = RecursiveRidge(size, penalty=tuple(penalties)), RandomProjection(width, size, seed)
        super().__init__(backbone, width, ridge, projection, first_session=first_session)
