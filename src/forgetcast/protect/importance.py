r"""Quadratic penalties with one weight a parameter: elastic weight consolidation and synaptic intelligence.

    L = L_new + strength sum_i Omega_i (theta_i - theta*_i)^2

The two differ in the importance Omega. A parameter that grew is held in its old rows alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.methods.base import Batch, Model, Protection, State, TaskData
from forgetcast.modes import evaluating
from forgetcast.protect.fisher import output_scores, require_fisher, squared_gradients, wide
from forgetcast.protect.parameters import leading, padded, trainable


class DiagonalPenalty(Protection):
    """`factor sum_i importance_i (theta_i - anchor_i)^2` over the trainable parameters.

    Args:
        factor: before the sum.

    Attributes:
        importance: by parameter; empty before the first task has ended.
        anchor: by parameter, of equal shape.

    Cost: two numbers a trainable parameter.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def loss(self, model: Model, batch: Batch, logits: Float[Tensor, "n C"]) -> Tensor | None:  # noqa: ARG002
        """The penalty now; none before the first task has ended."""
        terms = [
            (importance.to(parameter) * self._moved(name, parameter).square()).sum()
            for name, parameter in trainable(model).items()
            if (importance := self.importance.get(name)) is not None
        ]
        return self.factor * torch.stack(terms).sum() if terms else None

    def state_dict(self) -> State:
        """Importance and anchor."""
        return {"importance": dict(self.importance), "anchor": dict(self.anchor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.importance = dict(state["importance"])
        self.anchor = dict(state["anchor"])

    def _moved(self, name: str, parameter: Tensor) -> Tensor:
        anchor = self.anchor[name]
        return leading(parameter, anchor.shape) - anchor.to(parameter)


class FisherPenalty(DiagonalPenalty):
    r"""Elastic weight consolidation, offline or online.

        strength / 2 sum_tau sum_i F_tau,i (theta_i - theta_tau,i)^2            decay None
        strength / 2 sum_i F_i (theta_i - theta_last,i)^2,   F <- decay F + F_new   else

    The offline sum is kept, up to a constant, as one penalty: summed F around the F-weighted mean of the theta_tau.

    Args:
        strength: lambda.
        fisher: "exact" (expectation over the model's labels), "sampled" (one label drawn from the model) or
            "empirical" (the true label, which is no Fisher but widely used).
        likelihood: "categorical" (softmax over the outputs seen) or "gaussian" (squared loss, half).
        decay: gamma of the online form, at most 1.
        samples: read at most that many samples a task; None reads all.
        seed: of the sampled labels.

    Cost: at `end_task` one pass with as many backward passes as outputs seen ("exact") or one; then constant memory.

    Source: arXiv 1612.00796, eq. 3; online form arXiv 1805.06370, eq. 9. F is a mean over samples, so that
    `strength` does not depend on their number.
    """

    def __init__(
        self,
        strength: float,
        *,
        fisher: str = "exact",
        likelihood: str = "categorical",
        decay: float | None = None,
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        require_number("strength", strength)
        require_fisher(fisher, likelihood)
        if decay is not None:
            require_number("decay", decay, most=1.0)
        if samples is not None:
            require_integer("samples", samples, least=1)
        super().__init__(strength / 2)
        self.fisher = fisher
        self.likelihood = likelihood
        self.decay = decay
        self.samples = samples
        self.generator = torch.Generator().manual_seed(seed)

    def end_task(self, model: Model, task: TaskData) -> None:
        """Merge the Fisher of the task that ends into the penalty."""
        new = self._fisher(model, task)
        for name, parameter in trainable(model).items():
            now = parameter.detach().to(new[name])
            old = self.importance.get(name)
            if old is None:
                self.importance[name], self.anchor[name] = new[name], now.clone()
                continue
            old, anchor = padded(old.to(now), now.shape), padded(self.anchor[name].to(now), now.shape)
            if self.decay is not None:
                self.importance[name], self.anchor[name] = self.decay * old + new[name], now.clone()
            else:
                total = old + new[name]
                # where nothing was ever important any anchor will do
                mean = torch.where(total > 0, (old * anchor + new[name] * now) / total, now)
                self.importance[name], self.anchor[name] = total, mean

    def state_dict(self) -> State:
        """Importance, anchor and the generator of labels."""
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        super().load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())

    def _fisher(self, model: Model, task: TaskData) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(p, dtype=wide(p)) for name, p in trainable(model).items()}
        count = 0
        with evaluating(model):
            for batch in task.batches():
                inputs, labels = batch.inputs, batch.labels
                if self.samples is not None:
                    inputs, labels = inputs[: self.samples - count], labels[: self.samples - count]
                with torch.no_grad():
                    logits = model(inputs)
                scores = output_scores(
                    logits,
                    labels,
                    task.seen,
                    fisher=self.fisher,
                    likelihood=self.likelihood,
                    generator=self.generator,
                )
                for name, square in squared_gradients(model, inputs, scores).items():
                    total[name] += square
                count += len(inputs)
                if count == self.samples:
                    break
        require_samples(count)
        return {name: value / count for name, value in total.items()}


class PathPenalty(DiagonalPenalty):
    r"""Synaptic intelligence: a parameter matters by how much its path lowered the loss.

        omega_i = - sum_steps g_i dtheta_i        Omega_i += max(omega_i, 0) / ((theta_i - theta_start,i)^2 + damping)

    where g is the gradient without this penalty's own. For small steps `sum_i omega_i` is what the loss fell by.

    Args:
        strength: c; there is no half.
        damping: xi > 0.

    Cost: nothing but five numbers a trainable parameter; no pass over the data.

    Source: arXiv 1703.04200, eq. 3 to 5. A negative omega is cut at 0, which keeps the penalty bounded below.
    """

    def __init__(self, strength: float, *, damping: float = 0.1) -> None:
        require_number("strength", strength)
        require_number("damping", damping, strict=True)
        super().__init__(strength)
        self.damping = damping
        self.start: dict[str, Tensor] = {}
        self.path: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def begin_task(self, model: Model, task: TaskData) -> None:  # noqa: ARG002
        """A path starts here."""
        self.start = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
        self.path = {name: torch.zeros_like(value) for name, value in self.start.items()}

    def after_backward(self, model: Model) -> None:
        """Keep the gradient, less the penalty's own, and the place that the step starts from."""
        self._before = {}
        for name, parameter in trainable(model).items():
            if parameter.grad is None or name not in self.path:
                continue
            gradient = parameter.grad.detach().clone()
            if name in self.importance:
                importance = self.importance[name].to(parameter)
                leading(gradient, importance.shape).sub_(
                    2 * self.factor * importance * self._moved(name, parameter.detach())
                )
            self._before[name] = (gradient, parameter.detach().clone())

    def after_step(self, model: Model) -> None:
        """Add the step to the path."""
        parameters = trainable(model)
        for name, (gradient, place) in self._before.items():
            self.path[name] = self.path[name] - gradient * (parameters[name].detach() - place)
        self._before = {}

    def end_task(self, model: Model, task: TaskData) -> None:  # noqa: ARG002
        """Turn the path into importance; the anchor is where it ended."""
        for name, parameter in trainable(model).items():
            now = parameter.detach().clone()
            if name in self.path:
                new = self.path[name].clamp(min=0) / ((now - self.start[name]).square() + self.damping)
            else:
                new = torch.zeros_like(now)
            if name in self.importance:
                new = new + padded(self.importance[name], now.shape).to(new)
            self.importance[name], self.anchor[name] = new, now

    def state_dict(self) -> State:
        """Importance and anchor, and the path so far."""
        return {**super().state_dict(), "start": dict(self.start), "path": dict(self.path)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        super().load_state_dict(state)
        self.start, self.path = dict(state["start"]), dict(state["path"])


def require_samples(count: int) -> None:
    """Raise if a pass over a task has read no sample."""
    if count == 0:
        raise complaint("a task whose batches hold no samples", "at least one", "Let `TaskData.batches` read the task.")
