r"""MOS: adapters of its own for each task, merged with earlier ones as they train, and found again by its own answers.

    1. adapters A_t and head train on the cross-entropy over the task's classes + lambda times a term that keeps
       features apart                                                                         (`protect/instances.py`)
    2. merge     after each step of a later task   A_t <- (1 - a) A_t + a mean_{s<t} A_s         (`tuners/merged.py`)
    3. align     the head, on features drawn from Gaussians of all classes, each measured with its own task's adapters
    4. retrieve  by i <- the task of argmax_c f_c(phi(x; A_i)), until it stays                  (`heads/retrieved.py`)
       from the task of argmax_c cos(phi(x; A_1), mu_c), mu_c the class means of phi(.; A_1)
    5. answer    log[ softmax f(phi(x; A_i)) + softmax t cos(phi(x; A_1), mu) ]

No equation is named here: none could be verified. This is what the authors' code sets out to do
(sun-hailong/AAAI25-MOS, commit 8d5e07c).

Where this differs from that code, and why:

- A step merges once, and adapters stand still once their task has ended. The code also merges in place in each block of
  each forward pass, 12 times in a ViT-B, and does so to old adapters when it evaluates: test samples draw each of them
  to the mean of those before it, so that answers depend on how often it was asked.
- One head grows by rows of zero, at the rate of the adapters; the code draws it whole, and trains it at a tenth of it.
- Covariances are full, as in most released settings; for ImageNet-A the code keeps their diagonals alone.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from forgetcast.checks import require_integer, require_number
from forgetcast.heads.retrieved import Retrieved
from forgetcast.methods.base import Batch, Method, Model, State, TaskData, places_among
from forgetcast.methods.streamed import evaluated
from forgetcast.protect.gaussians import Alignment, Gaussians
from forgetcast.protect.instances import instances_apart
from forgetcast.protect.memory import task_features
from forgetcast.protect.processes import of_whole_batch
from forgetcast.tuners.adapter import Bottleneck
from forgetcast.tuners.anatomy import anatomy
from forgetcast.tuners.expandable import Expandable
from forgetcast.tuners.merged import begin_as_before, merge
from forgetcast.tuners.sections import width_of


class MOS(Method):
    """MOS on a transformer, which it freezes, for tasks that bring classes of their own.

    Within a task it answers as at the end of the one before.

    Args:
        backbone: the transformer.
        width: of its features.
        rank: of the adapters' bottlenecks; they are scaled by 0.1, as released.
        dropout: in them.
        momentum: a.
        contrast: lambda.
        rounds: adapters that are looked at for a sample, at most.
        rate: learning rate of the alignment.
        epochs: of it.
        samples: features drawn a class and epoch; five batches of them in the code.
        seed: of the draws.

    Cost: a step makes one pass forward and backward; the reading at the end of task t and an answer make t passes.
    Memory: each task's adapters, and d (d + 2) numbers a class of means and covariance.

    Source: arXiv 2412.09441.
    """

    needs_blocks = True

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        *,
        rank: int = 16,
        dropout: float = 0.1,
        momentum: float = 0.1,
        contrast: float = 0.1,
        rounds: int = 4,
        rate: float = 5e-3,
        epochs: int = 30,
        samples: int = 240,
        seed: int = 0,
    ) -> None:
        for name, value in (("rank", rank), ("rounds", rounds)):
            require_integer(name, value, least=1)
        for name, share in (("dropout", dropout), ("momentum", momentum)):
            require_number(name, share, most=1.0)
        require_number("contrast", contrast)
        parts = anatomy(backbone)
        stream = width_of(backbone, parts)
        self.network = Expandable(
            backbone, parts, partial(Bottleneck, stream, stream, rank, "relu", 0.1, True, dropout)
        )
        self.head = Retrieved(width)
        super().__init__(Model(self.network, self.head))
        self.momentum, self.contrast, self.rounds = momentum, contrast, rounds
        self.alignment, self.gaussians = Alignment(rate, epochs, samples), Gaussians(seed)

    def begin_task(self, task: TaskData) -> None:
        """New rows, and new adapters that equal those before."""
        super().begin_task(task)
        begin_as_before(self.network)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy over the classes of the task, whose samples all must be of; and the term."""
        rising, phi = sorted(self.classes), self.network.current(batch.inputs)
        loss = cross_entropy(self.head(phi)[:, rising], places_among(rising, batch.labels))
        means = [values["mean"].to(phi) for values in self.gaussians.classes.values()]
        old = torch.stack(means) if means else phi[:0].detach()
        return loss + self.contrast * of_whole_batch(batch, phi, lambda whole, _: instances_apart(whole, old))

    def after_step(self) -> None:
        """Merge."""
        merge(self.network, self.momentum)

    def end_task(self, task: TaskData) -> None:
        """The adapters settle; then measure the new classes, and align the head to all, after the first task."""
        self.network.settle()
        features, labels = task_features(self.model, task)
        self.gaussians.measure(features[:, -self.head.width :], labels)
        self.head.observe(features[:, : self.head.width], labels, task.classes, task.index)
        if task.index > 0:
            self.alignment.align(self.head, self.gaussians, self._unified_loss)

    def predict(self, inputs: Tensor) -> Float[Tensor, "n C"]:
        """As `Retrieved.answer`, of outputs whose task has ended."""
        with torch.no_grad(), evaluated(self.model):
            return self.head.answer(self.network(inputs).unflatten(1, (-1, self.head.width)), self.rounds)

    def state_dict(self) -> State:
        """That of every method, the Gaussians, and what a fresh one needs to be of the same shape."""
        shape = {"settled": len(self.network.settled), "begun": self.network.newest is not None}
        return {**super().state_dict(), **self.gaussians.state_dict(), **shape}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, within a task or between two."""
        self.network.restore(state["settled"], state["begun"])
        super().load_state_dict(state)
        self.gaussians.load_state_dict(state)

    def _unified_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy over all outputs seen."""
        return cross_entropy(logits[:, sorted(self.seen)], places_among(self.seen, labels))
