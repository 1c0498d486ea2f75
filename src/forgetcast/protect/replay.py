r"""Replay of stored samples: with their labels (experience replay), and with the outputs they once had (DER).

replay      strength E_memory CE(f(x), y)                                        CE over the outputs seen
DER         alpha E_memory || f(x) - z ||^2 / C  +  beta E_memory CE(f(x), y)    beta = 0 is DER, else DER++

Processes that share each batch hold the same memory and draw the same samples from it, so that their gradients average
to that of one process.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from forgetcast.checks import require_integer, require_number
from forgetcast.methods.base import Batch, Model, Protection, State, TaskData
from forgetcast.protect.memory import Exemplars, Reservoir, batch_of
from forgetcast.protect.processes import whole_columns


class Replay(Protection):
    """Cross-entropy on samples of ended tasks; each sample is offered to the memory once, when its task ends.

    Args:
        memory: which samples are kept.
        count: samples drawn for each batch.
        strength: before the term.

    Cost: a second forward and backward pass, of `count` samples.

    Source: arXiv 1902.10486.
    """

    def __init__(self, memory: Reservoir | Exemplars, count: int = 32, strength: float = 1.0) -> None:
        require_integer("count", count, least=1)
        require_number("strength", strength)
        self.memory = memory
        self.count = count
        self.strength = strength
        self.seen: tuple[int, ...] = ()

    def begin_task(self, model: Model, task: TaskData) -> None:  # noqa: ARG002
        """The outputs that the cross-entropy runs over."""
        self.seen = task.seen

    def loss(self, model: Model, batch: Batch, logits: Float[Tensor, "n C"]) -> Tensor | None:  # noqa: ARG002
        """The term on newly drawn samples; none in the first task."""
        if len(self.memory) == 0:
            return None
        old = batch_of(self.memory.draw(self.count), batch)
        return self.strength * seen_cross_entropy(model(old.inputs), old.labels, self.seen)

    def end_task(self, model: Model, task: TaskData) -> None:
        """Offer the task's samples to the memory."""
        self.memory.remember(model, task)

    def state_dict(self) -> State:
        """The memory and the outputs seen."""
        return {"memory": self.memory.state_dict(), "seen": list(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.memory.load_state_dict(state["memory"])
        self.seen = tuple(state["seen"])


class DarkReplay(Protection):
    """Hold the outputs of stored samples where they were when stored, along the whole path of training.

    A batch enters the memory at its loss, after the draw, with the logits it has then. Of a sample stored when the head
    was smaller, only the logits of that time are compared.

    Args:
        capacity: samples in the reservoir at most.
        count: samples drawn for each batch; two draws when beta > 0.
        alpha: weight of the squared distance of logits.
        beta: weight of the cross-entropy (DER++).
        seed: of the reservoir.

    Cost: one or two further passes of `count` samples.

    Source: dark experience replay, arXiv 2004.07211, algorithms 1 and 2. The squared distance is a mean over logits, as
    in the authors' code.
    """

    def __init__(self, capacity: int, count: int = 32, *, alpha: float = 0.3, beta: float = 0.0, seed: int = 0) -> None:
        require_integer("count", count, least=1)
        require_number("alpha", alpha)
        require_number("beta", beta)
        self.memory = Reservoir(capacity, seed)
        self.count = count
        self.alpha = alpha
        self.beta = beta
        self.seen: tuple[int, ...] = ()

    def begin_task(self, model: Model, task: TaskData) -> None:  # noqa: ARG002
        """The outputs that the cross-entropy runs over."""
        self.seen = task.seen

    def loss(self, model: Model, batch: Batch, logits: Float[Tensor, "n C"]) -> Tensor | None:
        """The terms on newly drawn samples, none while there are none; then the batch is offered to the reservoir."""
        total: Tensor | None = None
        if len(self.memory) > 0:
            drawn = self.memory.draw(self.count)
            now = model(batch_of(drawn, batch).inputs)
            total = self.alpha * _logit_distance(now, drawn["logits"].to(now), drawn["width"].to(now.device))
            if self.beta > 0:
                old = batch_of(self.memory.draw(self.count), batch)
                total = total + self.beta * seen_cross_entropy(model(old.inputs), old.labels, self.seen)
        columns = {
            "inputs": batch.inputs,
            "labels": batch.labels,
            "indices": batch.indices,
            "logits": logits.detach(),
            "width": torch.full_like(batch.labels, logits.shape[1]),
        }
        self.memory.add(whole_columns(batch, columns))
        return total

    def state_dict(self) -> State:
        """The reservoir and the outputs seen."""
        return {"memory": self.memory.state_dict(), "seen": list(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.memory.load_state_dict(state["memory"])
        self.seen = tuple(state["seen"])


def seen_cross_entropy(logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], seen: Sequence[int]) -> Tensor:
    """Mean cross-entropy over the outputs seen, the others masked out."""
    masked = torch.full_like(logits, -torch.inf)
    masked[:, list(seen)] = logits[:, list(seen)]
    return cross_entropy(masked, labels)


def _logit_distance(now: Tensor, stored: Tensor, width: Tensor) -> Tensor:
    """Mean, over samples and the logits each was stored with, of the squared difference."""
    inside = torch.arange(stored.shape[1], device=now.device) < width[:, None]
    gap = (now[:, : stored.shape[1]] - stored).masked_fill(~inside, 0)
    return (gap.square().sum(1) / width).mean()
