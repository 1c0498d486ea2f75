"""Frozen training: all of the model learns the first task, and its last part every other."""

from collections.abc import Sequence

from forgetcast.methods.base import Model
from forgetcast.methods.sequential import Sequential
from forgetcast.protect.magnitude import LastModules


class Frozen(Sequential):
    """Fine-tuning of the last modules and the head, after a first task of all that trains.

    Args:
        model: a backbone of which something trains, and head.
        specific: how many of the last modules train on; 0 leaves the head.
        modules: patterns of parameter names, one a module; by default the blocks of the stack.
        loss_outputs: as for `Sequential`.

    Source: arXiv 2602.20796.
    """

    def __init__(
        self, model: Model, specific: int = 0, *, modules: Sequence[str] | None = None, loss_outputs: str = "seen"
    ) -> None:
        super().__init__(model, [LastModules(specific, modules=modules)], loss_outputs=loss_outputs)
