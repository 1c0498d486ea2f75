"""A closed form whose backbone adapts to the first task by gradient before it freezes."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint
from forgetcast.heads.base import StreamedHead
from forgetcast.heads.linear import Linear
from forgetcast.methods.base import Batch, TaskData, protected_loss
from forgetcast.methods.streamed import ClosedForm, evaluated


class FirstSession(ClosedForm):
    """A closed form with an adaptation of its backbone in the first task, if asked for.

    In that session what trains of the backbone does so under a linear head, by cross-entropy, with the optimiser of the
    loop. Then that head is thrown away, the backbone freezes, and the method is the closed form that it is without.

    Args:
        backbone: maps inputs to features (n, width).
        width: features a sample.
        head: learns by `observe` and `solve`.
        expansion: a fixed map of the features that comes before the head, but not before that of the session.
        first_session: whether there is the session.

    Raises:
        ValueError: a session of a backbone of which nothing trains.

    Source: RanPAC, arXiv 2307.02251, algorithm 1, first phase; APER, arXiv 2303.07338.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        head: StreamedHead,
        expansion: nn.Module | None = None,
        *,
        first_session: bool = False,
    ) -> None:
        super().__init__(backbone if expansion is None else nn.Sequential(backbone, expansion), head)
        if first_session and not any(parameter.requires_grad for parameter in backbone.parameters()):
            raise complaint(
                "got first_session=True with a backbone of which nothing trains",
                "at least one parameter with requires_grad",
                "Unfreeze something, add an adapter, or leave first_session out.",
            )
        self.extractor = backbone
        self.width = width
        self.by_gradient = first_session
        if first_session:
            self.model.session = Linear(width)

    def takes_steps(self, index: int) -> bool:
        """In the first task alone, and only with a session."""
        return self.by_gradient and index == 0

    def begin_task(self, task: TaskData) -> None:
        """Grow the heads."""
        super().begin_task(task)
        if self._session is not None:
            self._session.grow(max(task.seen) + 1)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of the session's head.

        Raises:
            ValueError: there is no session, or it has ended.
        """
        if self._session is None:
            return super().loss(batch)
        return protected_loss(self, batch, self._session(self.extractor(batch.inputs)), self.seen, batch.labels)

    def end_task(self, task: TaskData) -> None:
        """End the session, if there is one; then read the task once and solve."""
        if self._session is not None:
            self.extractor.requires_grad_(False)
            del self.model.session
        super().end_task(task)

    def predict(self, inputs: Tensor) -> Float[Tensor, "n C"]:
        """Logits over every output seen so far; during the session, those of its head."""
        if self._session is None:
            return super().predict(inputs)
        with torch.no_grad(), evaluated(self.model):
            logits: Tensor = self._session(self.extractor(inputs))
        return logits

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, within the session or after it."""
        if self.by_gradient:
            if any(name.startswith("session.") for name in state["model"]):
                self.model.session = Linear(self.width)
            elif self._session is not None:
                del self.model.session
        super().load_state_dict(state)

    @property
    def _session(self) -> Linear | None:
        head = getattr(self.model, "session", None)
        return head if isinstance(head, Linear) else None
