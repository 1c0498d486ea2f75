"""Training on all tasks so far together: the upper bound."""

from forgetcast.methods.base import Model
from forgetcast.methods.sequential import Sequential


class Joint(Sequential):
    """Cross-entropy over all outputs seen, on the samples of all tasks so far.

    Args:
        model: backbone and head.
    """

    joint = True

    def __init__(self, model: Model) -> None:
        super().__init__(model)
