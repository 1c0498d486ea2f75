"""New rows of the head fitted on frozen features before anything else trains."""

from collections.abc import Mapping
from typing import Any

import torch

from forgetcast.checks import require_integer, require_number
from forgetcast.forecast.network.placed import place_rows
from forgetcast.methods.base import Model, Protection, State, TaskData


class Placement(Protection):
    """Places the rows of new classes; from equal rows an adapter gets no gradient, and its first steps are noise.

    Measured on a text encoder with LoRA, placed rows cut relative drift to a third and kept old accuracy, with the new
    task learnt as well (docs of the margin-tangent forecast).

    Args:
        iterations: of L-BFGS, at most.
        ridge: weight of the squared rows, relative to the mean squared feature.
    """

    def __init__(self, *, iterations: int = 100, ridge: float = 1e-3) -> None:
        require_integer("iterations", iterations, least=1)
        require_number("ridge", ridge)
        self.iterations = iterations
        self.ridge = ridge
        self.placed: set[int] = set()

    def begin_task(self, model: Model, task: TaskData) -> None:
        """Fit the rows of the classes that no earlier task had. Cost: one pass over the task's features."""
        new = sorted(set(task.classes) - self.placed)
        self.placed |= set(new)
        if len(new) < 2:
            return  # a loss over one class determines no row
        training = model.training
        model.eval()
        with torch.no_grad():
            read = [(model.features(batch.inputs).float(), batch.labels) for batch in task.batches()]
        model.train(training)
        phi, labels = (torch.cat(part) for part in zip(*read, strict=True))
        own = torch.isin(labels, torch.tensor(new, device=labels.device))
        place_rows(model.head, phi[own], labels[own], new, iterations=self.iterations, ridge=self.ridge)

    def state_dict(self) -> State:
        """The classes whose rows are placed."""
        return {"placed": sorted(self.placed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.placed = set(state["placed"])
