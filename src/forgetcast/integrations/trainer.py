"""Projected steps in the Trainer of Hugging Face transformers."""

from contextlib import ExitStack
from typing import Any

from forgetcast.checks import complaint
from forgetcast.protect.projection import Projection, Target, protect


def projection_callback(projection: Projection, target: Target = "step") -> Any:
    """A `TrainerCallback` under which every step of `trainer.train()` is projected.

    Args:
        projection: the spaces of old tasks, at the sites of the model that the trainer gets.
        target: "step", or "gradient" as in the paper.

    Raises:
        ValueError: transformers is not installed; at the start of training: an optimiser without the parameters.

    Examples:
        `Trainer(model=model, args=args, train_dataset=data, callbacks=[projection_callback(projection)]).train()`
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise complaint(
            f"cannot import transformers ({error})",
            "transformers",
            "Install it: pip install 'forgetcast[huggingface]'.",
        ) from error

    class ProjectionCallback(TrainerCallback):
        """Opens `protect` when training starts, and closes it when it ends."""

        def __init__(self) -> None:
            self.open = ExitStack()

        def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            """The optimiser is there: project its steps."""
            self.open.close()
            self.open.enter_context(protect(getattr(optimizer, "optimizer", optimizer), projection, target))

        def on_train_end(self, *_: Any, **__: Any) -> None:
            """Steps are the optimiser's own again."""
            self.open.close()

    return ProjectionCallback()
