r"""Distillation from the model as it was when the task began: learning without forgetting.

softened    T^2 E [ - sum_c q_c log p_c ],   q = softmax(f_old / T),   p = softmax(f / T),   c over old outputs
logits      E || f - f_old ||^2 / C_old
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from forgetcast.checks import require_choice, require_number
from forgetcast.methods.base import Batch, Model, Protection, State, TaskData
from forgetcast.modes import evaluating
from forgetcast.protect.parameters import trainable


class Distillation(Protection):
    """Hold the old outputs where the model had them when the task began, on the inputs of the new task.

    Args:
        strength: before the term.
        temperature: T of the softened form.
        form: "softened" or "logits".

    Attributes:
        known: outputs of the tasks that have ended.
        outputs: those held in the present task; empty in the first, which has no term.
        snapshot: values of the trainable parameters and all buffers when the task began. Nothing else can have changed,
            so the old model is the present one called with these.

    Cost: one copy of what trains, one forward pass a batch.

    Source: arXiv 1606.09282, eq. 2; the factor T^2 (arXiv 1503.02531) keeps the gradient's size when T changes, and one
    softmax runs over all old outputs.
    """

    def __init__(self, strength: float = 1.0, *, temperature: float = 2.0, form: str = "softened") -> None:
        require_number("strength", strength)
        require_number("temperature", temperature, strict=True)
        require_choice("form", form, ("softened", "logits"))
        self.strength = strength
        self.temperature = temperature
        self.form = form
        self.known: list[int] = []
        self.outputs: list[int] = []
        self.snapshot: dict[str, Tensor] = {}

    def begin_task(self, model: Model, task: TaskData) -> None:  # noqa: ARG002
        """Take the snapshot; the old outputs are those of the tasks ended so far."""
        self.outputs = list(self.known)
        held = {**trainable(model), **dict(model.named_buffers())} if self.outputs else {}
        self.snapshot = {name: value.detach().clone() for name, value in held.items()}

    def loss(self, model: Model, batch: Batch, logits: Float[Tensor, "n C"]) -> Tensor | None:
        """The term on this batch; none in the first task."""
        if not self.outputs:
            return None
        with torch.no_grad(), evaluating(model):
            snapshot = {name: value.to(logits.device) for name, value in self.snapshot.items()}
            target: Tensor = functional_call(model, snapshot, (batch.inputs,))[:, self.outputs]
        kept = logits[:, self.outputs]
        if self.form == "logits":
            return self.strength * mse_loss(kept, target)
        T = self.temperature
        return self.strength * T**2 * cross_entropy(kept / T, (target / T).softmax(1))

    def end_task(self, model: Model, task: TaskData) -> None:  # noqa: ARG002
        """The outputs seen become old; the snapshot has served."""
        self.known, self.outputs, self.snapshot = list(task.seen), [], {}

    def state_dict(self) -> State:
        """The outputs of ended tasks, those held now, and the snapshot."""
        return {"known": list(self.known), "outputs": list(self.outputs), "snapshot": dict(self.snapshot)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.known, self.outputs = list(state["known"]), list(state["outputs"])
        self.snapshot = dict(state["snapshot"])
