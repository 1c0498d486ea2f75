"""Nearest class mean, in Euclidean distance (NCM) and in angle (SimpleCIL)."""

from torch import nn

from forgetcast.heads.prototype import Prototype
from forgetcast.methods.streamed import ClosedForm


class NCM(ClosedForm):
    """Nearest class mean in Euclidean distance.

    Args:
        backbone: maps inputs to features (n, width).
        width: features a sample.

    Source: Mensink et al., TPAMI 2013.
    """

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__(backbone, Prototype(width, metric="euclidean"))


class SimpleCIL(ClosedForm):
    """Cosine to the class means of a pretrained backbone.

    Args:
        backbone: maps inputs to features (n, width).
        width: features a sample.

    Source: Zhou et al., arXiv 2303.07338, section 4.
    """

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__(backbone, Prototype(width, metric="cosine"))
