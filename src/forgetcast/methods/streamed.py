"""A method in closed form: read the features of a task once, let the head take them in, solve."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint
from forgetcast.heads.base import StreamedHead
from forgetcast.methods.base import Batch, Method, Model, TaskData

BLOCK = 4096


class ClosedForm(Method):
    """A frozen backbone and a head that learns from one reading of each task, in `end_task`, without gradient.

    The head keeps sums over samples, so the result is that of all tasks at once, in any order.

    Args:
        backbone: maps inputs to features (n, d); read in evaluation mode, its modes are put back.
        head: learns by `observe` and `solve`.
    """

    by_gradient = False

    def __init__(self, backbone: nn.Module, head: StreamedHead) -> None:
        super().__init__(Model(backbone, head))
        self.head = head

    def loss(self, batch: Batch) -> Tensor:
        """There is none.

        Raises:
            ValueError: always.
        """
        raise complaint(
            f"a gradient step of {len(batch.labels)} samples was asked of {type(self).__name__}",
            "none: it learns in end_task",
            "Take steps only where by_gradient is true.",
        )

    def end_task(self, task: TaskData) -> None:
        """Read the task once and solve.

        Raises:
            ValueError: whatever the head refuses: features that are not finite, a singular system.
        """
        super().end_task(task)
        with torch.no_grad(), evaluated(self.model):
            for phi, labels in self._blocks(task):
                self.head.observe(phi, labels)
            self.head.solve()

    def _blocks(self, task: TaskData) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and labels in blocks of many batches: a head adds d x d sums for each block, however short."""
        phis: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in task.batches():
            phis.append(self.model.features(batch.inputs))
            labels.append(batch.labels)
            if sum(map(len, phis)) >= BLOCK:
                yield torch.cat(phis), torch.cat(labels)
                phis, labels = [], []
        if phis:
            yield torch.cat(phis), torch.cat(labels)

    def predict(self, inputs: Tensor) -> Float[Tensor, "n C"]:
        """Logits over every output seen so far, float64, in evaluation mode, so that no row depends on another."""
        with torch.no_grad(), evaluated(self.model):
            return super().predict(inputs)


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule has the mode that it had."""
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
