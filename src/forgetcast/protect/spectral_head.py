"""The spectral regulariser as a protection: the head's old outputs are held along their vulnerable modes."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.forecast.penalty import QuadraticPenalty
from forgetcast.heads.linear import Linear
from forgetcast.methods.base import Batch, Model, Protection, State, TaskData
from forgetcast.protect.memory import task_features
from forgetcast.protect.spectral import SpectralAnchor, combined_penalty
from forgetcast.tangent.features import Features
from forgetcast.tangent.linear_head import LinearHead


class SpectralHead(Protection):
    r"""Holds a linear head on frozen features; keeps no sample.

        strength sum_tau 1 / (2 n_tau) || S_tau (W - W_tau) ||_F^2,     S_tau = Sigma V^T of the task's top modes

    With all modes each term is half the mean squared drift of the task's outputs. Outputs that come later are held at
    zero on the old samples. Memory: at most (d + 1)^2 + (d + 1) C numbers, whatever the number of tasks.

    Args:
        strength: weight of the penalty.
        modes: sample modes held for each task; more than there are means all.

    Source: arXiv 2606.18024, the spectral regulariser in its data-free form for a linear head.
    """

    def __init__(self, strength: float = 1.0, modes: int = 64) -> None:
        require_number("strength", strength)
        require_integer("modes", modes)
        self.strength = strength
        self.modes = modes
        self.penalty: QuadraticPenalty | None = None

    def begin_task(self, model: Model, task: TaskData) -> None:  # noqa: ARG002
        """Grow what is held to the head's outputs.

        Raises:
            ValueError: a head that is not linear, a backbone that trains.
        """
        trains = [name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad]
        if trains or not isinstance(model.head, Linear):
            raise complaint(
                f"a {type(model.head).__name__} on a backbone of which {trains[:3] or 'nothing'} trains",
                "a linear head on frozen features",
                "Freeze the backbone (requires_grad_(False)), or use another protection.",
            )
        if self.penalty is not None:
            self.penalty = grown(self.penalty, model.head.outputs)

    def loss(self, model: Model, batch: Batch, logits: Float[Tensor, "n C"]) -> Tensor | None:  # noqa: ARG002
        """The penalty at the head now. Cost: (d + 1)^2 C, whatever the batch."""
        if self.penalty is None:
            return None
        weight = stacked(model.head)
        gap = self.penalty.root.to(weight) @ weight - self.penalty.target.to(weight)
        return gap.square().sum() / 2

    def end_task(self, model: Model, task: TaskData) -> None:
        """Add the anchor of the task just learnt. Cost: one pass and one factorisation."""
        phi, _ = task_features(model, task)
        values = stacked(model.head).detach()
        bias = getattr(model.head, "bias", None) is not None
        head = LinearHead(values[:-1], values[-1]) if bias else LinearHead(values)
        anchor = SpectralAnchor.of(Features(phi), head, self.modes)
        if anchor.modes == 0:
            return
        own = anchor.penalty(self.strength * anchor.modes * head.outputs / (2 * len(phi)))
        self.penalty = own if self.penalty is None else combined_penalty([self.penalty, own])

    def state_dict(self) -> State:
        """The penalty: its root, target and constant."""
        if self.penalty is None:
            return {}
        return {"root": self.penalty.root, "target": self.penalty.target, "constant": self.penalty.constant}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.penalty = QuadraticPenalty(state["root"], state["target"], state["constant"]) if state else None


def stacked(head: Any) -> Float[Tensor, "rows C"]:
    """Weight and bias of a `Linear` as one matrix (d + 1, C), with gradient."""
    rows: Tensor = head.weight.T
    return rows if head.bias is None else torch.cat([rows, head.bias[None]])


def grown(penalty: QuadraticPenalty, outputs: int) -> QuadraticPenalty:
    """The same penalty for a head grown to `outputs`: the new ones are held at zero."""
    extra = penalty.target.new_zeros(len(penalty.target), outputs - penalty.target.shape[1])
    return QuadraticPenalty(penalty.root, torch.cat([penalty.target, extra], 1), penalty.constant)
