"""Nearest class mean, in Euclidean distance (NCM) and in angle (SimpleCIL)."""

from torch import nn

from forgetcast.heads.prototype import Prototype
from forgetcast.methods.session import FirstSession
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


class SimpleCIL(FirstSession):
    """Cosine to the class means of a pretrained backbone.

    Args:
        backbone: maps inputs to features (n, width).
        width: features a sample.
        first_session: whether what trains of the backbone adapts to the first task. This is APER without the features
            of the backbone as it was, which that method puts beside the adapted ones.

    Source: Zhou et al., arXiv 2303.07338, section 4, and APER.
    """

    def __init__(self, backbone: nn.Module, width: int, *, first_session: bool = False) -> None:
        super().__init__(backbone, width, Prototype(width, metric="cosine"), first_session=first_session)
