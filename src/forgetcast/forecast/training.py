r"""How the new task will be trained: small frozen descriptions, the same ones that a real run takes.

Conventions, everywhere in this package:

* `loss="squared"` is the squared error *without* a half; `reduction="mean"` divides by samples and outputs, as
  `torch.nn.MSELoss`, `"sum"` by nothing. `loss="cross_entropy"` averages or sums over samples.
* momentum, Nesterov's form and weight decay are those of `torch.optim.SGD` and `torch.optim.AdamW`.
* weight decay (toward zero) and drift penalty (toward the start) act on weight and bias alike: the step uses
  `gradient + weight_decay * W + drift_penalty * (W - W_start)`.
* `classes` are the outputs that the loss sees (all by default); the others feel decay and penalties only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import log
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypeIs

from forgetcast.checks import complaint, require_choice, require_integer, require_number
from forgetcast.forecast import filters

Loss = Literal["squared", "cross_entropy"]
Reduction = Literal["mean", "sum"]
LearningRate = float | Sequence[float]
ROUNDING = torch.finfo(torch.float64).eps


def data_curvature(reduction: Reduction, rows: int, outputs: int) -> float:
    """Second derivative of the squared error per unit of Gram: 2 for a sum, `2 / (n C)` for a mean."""
    return 2.0 if reduction == "sum" else 2.0 / (rows * outputs)


@dataclass(frozen=True)
class GradientDescent:
    """Full-batch gradient descent, with momentum and a schedule if wanted.

    Args:
        learning_rate: step size, or one for each step.
        steps: number of steps.
        momentum: as in `torch.optim.SGD`, dampening 0.
        weight_decay: decay toward zero.
        drift_penalty: pull toward the weights at the start.
        loss: "squared" has a closed form; "cross_entropy" an exact recursion.
        reduction: "mean" or "sum".
        nesterov: Nesterov's form of the momentum.
        classes: outputs that the loss sees; None for all.

    Raises:
        ValueError: a value out of its range, a schedule of the wrong length.
    """

    dial: ClassVar[str] = "steps"

    learning_rate: LearningRate
    steps: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    drift_penalty: float = 0.0
    loss: Loss = "squared"
    reduction: Reduction = "mean"
    nesterov: bool = False
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        normalise(self)
        check_descent(self)

    @property
    def data_weight(self) -> float:
        """Factor of the data term; 1 for a loss taken as it is."""
        return 1.0

    def decay(self, steps: float) -> float:  # noqa: ARG002
        """Strength of the pull toward zero."""
        return self.weight_decay

    def filter(self, a: Tensor, steps: float) -> Tensor:
        """phi(a) after `steps` steps. Cost: O(k log steps), or O(k steps) with a schedule."""
        count = int(steps)
        if not isinstance(self.learning_rate, float | int):
            return filters.scheduled_descent(a, self.learning_rate[:count], self.momentum, self.nesterov)
        if self.momentum == 0:
            return filters.gradient_descent(a, self.learning_rate, count)
        return filters.momentum_descent(a, self.learning_rate, count, self.momentum, self.nesterov)

    def stiffness(self, steps: float) -> float:  # noqa: ARG002
        """Curvature of the training's own that `filter` adds."""
        return 0.0

    def converged_between(self, steps: float) -> tuple[float, float] | None:
        """Curvatures between which phi(a) is 1 / a to rounding after `steps`: `|1 - learning_rate a|^steps <= eps`."""
        if not isinstance(self.learning_rate, float | int) or self.momentum > 0 or steps == 0:
            return None
        least = (1 - ROUNDING ** (1 / steps)) / self.learning_rate
        return least, 2 / self.learning_rate - least

    def check_stable(self, largest: float) -> None:
        """Raise if the learning rate makes the direction of curvature `largest` diverge; names the largest stable one.

        Limits: 2 / a; heavy ball 2 (1 + momentum) / a; Nesterov 2 (1 + momentum) / ((1 + 2 momentum) a).
        """
        spread = 1 + 2 * self.momentum if self.nesterov else 1.0
        limit = 2 * (1 + self.momentum) / spread / largest if largest > 0 else float("inf")
        rate = (
            self.learning_rate if isinstance(self.learning_rate, float | int) else max(self.learning_rate, default=0.0)
        )
        if rate > limit * (1 + 1e-12):
            raise complaint(
                f"got learning_rate={rate:g} where the steepest direction of the loss has curvature {largest:g}",
                f"at most {limit:.6g}, the largest stable learning rate",
                f"Set learning_rate below {limit:.6g}, or normalise the features.",
            )


@dataclass(frozen=True)
class GradientFlow:
    """Gradient flow on the squared error: the limit of small steps, `learning_rate * steps = time`.

    Args:
        time: how long the flow runs.
        weight_decay: decay toward zero.
        drift_penalty: pull toward the weights at the start.
        reduction: "mean" or "sum".
        classes: outputs that the loss sees; None for all.
    """

    dial: ClassVar[str] = "time"
    loss: ClassVar[Loss] = "squared"

    time: float
    weight_decay: float = 0.0
    drift_penalty: float = 0.0
    reduction: Reduction = "mean"
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        normalise(self)
        require_number("time", self.time)
        check_shared(self)

    @property
    def data_weight(self) -> float:
        """Factor of the data term; 1 for a loss taken as it is."""
        return 1.0

    def decay(self, time: float) -> float:  # noqa: ARG002
        """Strength of the pull toward zero."""
        return self.weight_decay

    def filter(self, a: Tensor, time: float) -> Tensor:
        """phi(a) after `time`."""
        return filters.gradient_flow(a, time)

    def stiffness(self, time: float) -> float:  # noqa: ARG002
        """Curvature of the training's own that `filter` adds."""
        return 0.0

    def converged_between(self, time: float) -> tuple[float, float] | None:
        """Curvatures between which phi(a) is 1 / a to rounding after `time`: `exp(-time a) <= eps`."""
        return (-log(ROUNDING) / time, float("inf")) if time > 0 else None

    def check_stable(self, largest: float) -> None:
        """A flow is always stable."""


@dataclass(frozen=True)
class Ridge:
    r"""The converged solution with a quadratic penalty.

    The minimiser of

        1/2 ||phi W - Y||^2 + penalty/2 ||W - W_start||^2

    summed, as in the paper and in `sklearn.linear_model.Ridge`.

    Args:
        penalty: lambda; 0 takes the solution nearest to the start (pseudo-inverse).
        toward: "start" (the paper's drift penalty) or "zero" (ordinary weight decay, run to convergence).
        classes: outputs that the loss sees; None for all.

    Source: arXiv 2606.18024, Proposition 1.
    """

    dial: ClassVar[str] = "penalty"
    loss: ClassVar[Loss] = "squared"
    reduction: ClassVar[Reduction] = "sum"
    drift_penalty: ClassVar[float] = 0.0
    weight_decay: ClassVar[float] = 0.0

    penalty: float
    toward: Literal["start", "zero"] = "start"
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        normalise(self)
        require_number("penalty", self.penalty)
        require_choice("toward", self.toward, ("start", "zero"))
        check_shared(self)

    @property
    def data_weight(self) -> float:
        """Factor of the data term: the half that `loss="squared"` does not have."""
        return 0.5

    def decay(self, penalty: float) -> float:
        """Strength of the pull toward zero."""
        return penalty if self.toward == "zero" else 0.0

    def filter(self, a: Tensor, penalty: float) -> Tensor:
        """phi(a) at `penalty`."""
        return filters.ridge(a, penalty)

    def stiffness(self, penalty: float) -> float:
        """Curvature of the training's own that `filter` adds: the penalty."""
        return penalty

    def converged_between(self, penalty: float) -> tuple[float, float] | None:  # noqa: ARG002
        """Curvatures between which phi(a) is `1 / (a + penalty)`: all."""
        return 0.0, float("inf")

    def check_stable(self, largest: float) -> None:
        """A minimiser is always stable."""


@dataclass(frozen=True)
class SGD:
    """Minibatch `torch.optim.SGD`; the forecast replays it exactly in feature space.

    The sample order is that of `torch.utils.data.RandomSampler` with a generator seeded by `seed`, a new permutation
    each epoch, the last short batch kept; or it is given as `order`, one sequence of sample indices for each step.

    Args:
        learning_rate: step size, or one for each step.
        steps: number of steps.
        batch_size: samples a step.
        momentum: as in `torch.optim.SGD`.
        weight_decay: decay toward zero.
        drift_penalty: pull toward the weights at the start.
        loss: "squared" or "cross_entropy".
        reduction: "mean" or "sum", within a batch.
        nesterov: Nesterov's form of the momentum.
        max_gradient_norm: gradients are scaled down to this norm over all parameters, as
            `torch.nn.utils.clip_grad_norm_` does; None for never.
        seed: of the sample order.
        order: sample indices of every step, instead of `batch_size` and `seed`.
        classes: outputs that the loss sees; None for all.
    """

    dial: ClassVar[str] = "steps"

    learning_rate: LearningRate
    steps: int
    batch_size: int = 64
    momentum: float = 0.0
    weight_decay: float = 0.0
    drift_penalty: float = 0.0
    loss: Loss = "cross_entropy"
    reduction: Reduction = "mean"
    nesterov: bool = False
    max_gradient_norm: float | None = None
    seed: int = 0
    order: Sequence[Sequence[int]] | None = None
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        normalise(self)
        check_descent(self)
        check_minibatch(self)

    def optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of a real run."""
        return sgd(self, parameters)


@dataclass(frozen=True)
class AdamW:
    """Minibatch `torch.optim.AdamW` (decoupled decay); the forecast replays it exactly in feature space.

    Args:
        learning_rate: step size, or one for each step.
        steps: number of steps.
        batch_size: samples a step.
        betas: decay of the first and second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled decay toward zero.
        drift_penalty: pull toward the weights at the start, part of the gradient.
        loss: "squared" or "cross_entropy".
        reduction: "mean" or "sum", within a batch.
        max_gradient_norm: gradients are scaled down to this norm over all parameters, as
            `torch.nn.utils.clip_grad_norm_` does; None for never.
        seed: of the sample order (see `SGD`).
        order: sample indices of every step, instead of `batch_size` and `seed`.
        classes: outputs that the loss sees; None for all.
    """

    dial: ClassVar[str] = "steps"

    learning_rate: LearningRate
    steps: int
    batch_size: int = 64
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    drift_penalty: float = 0.0
    loss: Loss = "cross_entropy"
    reduction: Reduction = "mean"
    max_gradient_norm: float | None = None
    seed: int = 0
    order: Sequence[Sequence[int]] | None = None
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        normalise(self)
        check_rates(self.learning_rate, self.steps)
        check_shared(self)
        check_minibatch(self)
        for beta in self.betas:
            require_number("betas", beta, most=1.0)
            if beta == 1:
                raise complaint(f"got betas={self.betas}", "betas below 1", "Typical values are (0.9, 0.999).")
        require_number("epsilon", self.epsilon)

    def optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of a real run."""
        return torch.optim.AdamW(
            parameters,
            lr=rate_at(self.learning_rate, 0),
            betas=self.betas,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
        )


ClosedForm = GradientDescent | GradientFlow | Ridge
Minibatch = SGD | AdamW
Training = GradientDescent | GradientFlow | Ridge | SGD | AdamW


def is_closed_form(training: Training) -> TypeIs[ClosedForm]:
    """Whether the training has a closed form: full-batch, squared loss."""
    return isinstance(training, GradientFlow | Ridge) or (
        isinstance(training, GradientDescent) and training.loss == "squared"
    )


def normalise(training: Training) -> None:
    """Turn numpy and torch scalars, schedules and class lists into plain Python values, which records can hold."""
    for field in fields(training):
        if field.name not in ("order", "betas"):
            object.__setattr__(training, field.name, _plain(getattr(training, field.name)))


def _plain(value: Any) -> Any:
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


def sgd(training: GradientDescent | SGD, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """`torch.optim.SGD` with the settings of `training`."""
    return torch.optim.SGD(
        parameters,
        lr=rate_at(training.learning_rate, 0),
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=training.nesterov,
    )


def rate_at(learning_rate: LearningRate, step: int) -> float:
    """The learning rate of one step (of the first, for an empty schedule of no steps: 0)."""
    if isinstance(learning_rate, float | int):
        return float(learning_rate)
    return float(learning_rate[step]) if len(learning_rate) else 0.0


def clip_gradients(training: Training, parameters: Iterable[Tensor]) -> None:
    """Scale gradients down to the training's largest norm, if it has one."""
    if isinstance(training, SGD | AdamW) and training.max_gradient_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, training.max_gradient_norm)


def clip_factor(training: Training, norm: float) -> float:
    """What `clip_gradients` multiplies gradients of this norm by."""
    limit = training.max_gradient_norm if isinstance(training, SGD | AdamW) else None
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))


def check_rates(learning_rate: LearningRate, steps: int) -> None:
    """Raise unless the learning rate, or every one of exactly `steps`, is a positive number."""
    require_integer("steps", steps)
    if isinstance(learning_rate, float | int):
        require_number("learning_rate", learning_rate, strict=True)
        return
    if len(learning_rate) != steps:
        raise complaint(
            f"got a schedule of {len(learning_rate)} learning rates for {steps} steps",
            "one learning rate for each step",
            "Give a single number, or a schedule as long as the run.",
        )
    for step, rate in enumerate(learning_rate):
        require_number(f"learning_rate[{step}]", rate)


def check_descent(training: GradientDescent | SGD) -> None:
    """Checks that plain and minibatch descent share."""
    check_rates(training.learning_rate, training.steps)
    require_number("momentum", training.momentum, most=1.0)
    if training.momentum == 1:
        raise complaint("got momentum=1", "a momentum below 1", "A typical value is 0.9.")
    if training.nesterov and training.momentum == 0:
        raise complaint("got nesterov=True with momentum=0", "a positive momentum", "Set momentum, or nesterov=False.")
    check_shared(training)


def check_minibatch(training: Minibatch) -> None:
    """Checks of batch size, seed and order."""
    require_integer("batch_size", training.batch_size, least=1)
    require_integer("seed", training.seed)
    if training.max_gradient_norm is not None:
        require_number("max_gradient_norm", training.max_gradient_norm, strict=True)
    if training.order is not None and len(training.order) != training.steps:
        raise complaint(
            f"got an order of {len(training.order)} batches for {training.steps} steps",
            "one batch of sample indices for each step",
            "Set steps=len(order).",
        )


def check_shared(training: Training) -> None:
    """Checks that every training shares."""
    require_number("weight_decay", training.weight_decay)
    require_number("drift_penalty", training.drift_penalty)
    require_choice("loss", training.loss, ("squared", "cross_entropy"))
    require_choice("reduction", training.reduction, ("mean", "sum"))
    if training.classes is not None:
        for label in training.classes:
            require_integer("classes", label)
        if len(set(training.classes)) != len(training.classes) or not training.classes:
            raise complaint(
                f"got classes={training.classes}", "distinct outputs, at least one", "Leave classes=None for all."
            )
