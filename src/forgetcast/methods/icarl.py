"""iCaRL: herded exemplars, distillation, and prediction by the nearest mean of exemplars."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from forgetcast.checks import require_integer
from forgetcast.heads.base import UNSEEN
from forgetcast.methods.base import Batch, Model, State, TaskData, protected_loss
from forgetcast.methods.sequential import Sequential
from forgetcast.modes import evaluating
from forgetcast.protect.distill import Distillation
from forgetcast.protect.memory import Exemplars, batch_of


class ICaRL(Sequential):
    """New samples and exemplars as one batch, with cross-entropy over all outputs seen and distillation of the old.

    Prediction is by `-|| phi / |phi| - mu_c ||^2`, mu_c the unit mean of the class's exemplars when the last task
    ended; before that it is by the head.

    Args:
        model: backbone and head.
        capacity: exemplars of all classes together.
        count: exemplars drawn for each batch.
        strength: weight of the distillation.
        temperature: of the distillation.
        seed: of the draws.

    Attributes:
        means: mu (C, d); None before the first task has ended.

    Source: arXiv 1611.07725, with softmax losses in place of its sigmoid ones, as in most later code.
    """

    def __init__(
        self,
        model: Model,
        capacity: int = 2000,
        count: int = 32,
        *,
        strength: float = 1.0,
        temperature: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__(model, [Distillation(strength, temperature=temperature)])
        require_integer("count", count, least=1)
        self.memory = Exemplars(capacity, seed)
        self.count = count
        self.means: Tensor | None = None

    def plain_outputs(self) -> None:
        """None: batches hold exemplars, and their means answer instead of the head."""

    def loss(self, batch: Batch) -> Tensor:
        """The loss of the batch with exemplars drawn beside it, each sample with equal weight.

        As two means and not one, because processes that share the new samples all have the same old ones.
        """
        if len(self.memory) == 0:
            return super().loss(batch)
        old = batch_of(self.memory.draw(self.count), batch)
        logits = self.model(torch.cat([batch.inputs, old.inputs]))
        ours, theirs = logits.split([len(batch.labels), len(old.labels)])
        new = len(batch.labels) if batch.rows is None else batch.rows
        return (
            new * protected_loss(self, batch, ours, self.seen, batch.labels)
            + len(old.labels) * protected_loss(self, old, theirs, self.seen, old.labels)
        ) / (new + len(old.labels))

    def end_task(self, task: TaskData) -> None:
        """Herd the new classes; then the means of all, as the features of the old have changed too."""
        super().end_task(task)
        self.memory.remember(self.model, task)
        device = next(self.model.parameters()).device
        with torch.no_grad(), evaluating(self.model):
            means = {
                label: normalize(normalize(self.model.features(columns["inputs"].to(device))).mean(0), dim=0)
                for label, columns in self.memory.classes.items()
            }
        width = len(next(iter(means.values())))
        # a column of NaN marks an output without exemplars
        self.means = torch.full((max(task.seen) + 1, width), torch.nan, device=device)
        for label, mean in means.items():
            self.means[label] = mean.to(self.means)

    def predict(self, inputs: Tensor) -> Float[Tensor, "n C"]:
        """Minus the squared distance of the unit feature to each class's mean."""
        if self.means is None:
            return super().predict(inputs)
        phi = normalize(self.model.features(inputs))
        means = self.means.to(phi)
        return (2 * phi @ means.T - 2).masked_fill(means.isnan().any(1), UNSEEN)

    def state_dict(self) -> State:
        """That of every method, the exemplars and their means."""
        means = {} if self.means is None else {"means": self.means}
        return {**super().state_dict(), "memory": self.memory.state_dict(), **means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        super().load_state_dict(state)
        self.memory.load_state_dict(state["memory"])
        self.means = state.get("means")
