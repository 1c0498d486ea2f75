"""ACIL: an analytic head, equal to joint ridge regression after every task."""

from torch import nn

from forgetcast.heads.projection import RandomProjection
from forgetcast.heads.ridge import RecursiveRidge
from forgetcast.methods.streamed import ClosedForm


class ACIL(ClosedForm):
    """Ridge regression with one fixed penalty, on features that may be expanded at random first.

    The paper updates the inverse of the Gram, sample by sample; here the Gram itself is kept and solved once a task,
    which is the same head with less rounding.

    Args:
        backbone: maps inputs to features (n, width).
        width: features a sample.
        penalty: of the ridge.
        size: random features of the expansion; 0 takes the features as they are.
        seed: of the expansion.

    Source: Zhuang et al., NeurIPS 2022 (arXiv 2205.14922).
    """

    def __init__(self, backbone: nn.Module, width: int, *, penalty: float = 1.0, size: int = 0, seed: int = 0) -> None:
        if size:
            backbone = nn.Sequential(backbone, RandomProjection(width, size, seed))
        super().__init__(backbone, RecursiveRidge(size or width, penalty=penalty))
