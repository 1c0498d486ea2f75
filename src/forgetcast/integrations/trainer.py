"""Projected steps in the Trainer of Hugging Face transformers."""

from contextlib import ExitStack
from typing import Any

from forgetcast.checks import require_module
from forgetcast.protect.projection import Projection
from forgetcast.protect.restraint import Target, protect


def projection_callback(projection: Projection, target: Target = "step") -> Any:
    """A `TrainerCallback` under which every step of `trainer.train()` is projected.

    The optimiser is protected while it steps, and at no other time: training that ends by an error leaves it as it was.

    Args:
        projection: the spaces of old tasks, at the sites of the model that the trainer gets.
        target: "step", or "gradient" as in the paper.

    Raises:
        ValueError: transformers is not installed; at the start of training: an optimiser without the parameters, or
            one that is protected already.

    Examples:
        `Trainer(model=model, args=args, train_dataset=data, callbacks=[projection_callback(projection)]).train()`
    """
    base: Any = require_module("transformers", "huggingface").TrainerCallback

    class ProjectionCallback(base):  # type: ignore[misc]
        """Opens `protect` before each step of the optimiser, and closes it behind."""

        def __init__(self) -> None:
            self.open = ExitStack()

        def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            """Refuse at once what no step could be projected with."""
            self.open.close()
            with protect(optimizer, projection, target):
                pass

        def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            """The next step is projected."""
            self.open.close()
            self.open.enter_context(protect(optimizer, projection, target))

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            """Steps are the optimiser's own again."""
            self.open.close()

    return ProjectionCallback()
