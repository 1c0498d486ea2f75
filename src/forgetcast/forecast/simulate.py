r"""Training a linear head in feature space: exact where no closed form exists.

For a linear head the forecast of cross-entropy, minibatches or AdamW *is* cheap training: gradients are written down
(no autograd), the optimiser is PyTorch's own, and nothing but the head is computed. Full batches may run in the dual

    W_i = (1 + gamma_i) W_0 + phi^T A_i,     logits = (1 + gamma_i) phi W_0 + (phi phi^T) A_i

which needs one product with the n x n Gram a step and is exact for any optimiser of the SGD family.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.data import RandomSampler

from forgetcast.checks import complaint
from forgetcast.forecast.path import WeightPath, check_seen
from forgetcast.forecast.penalty import QuadraticPenalty
from forgetcast.forecast.training import (
    GradientDescent,
    Minibatch,
    Training,
    clip_gradients,
    data_curvature,
    rate_at,
    sgd,
)
from forgetcast.tangent.features import Features, check_targets
from forgetcast.tangent.linear_head import with_bias
from forgetcast.tangent.spectrum import Spectrum, spectrum_of

Changes = list[Float[Tensor, "rows C"]]


@dataclass(frozen=True, eq=False)
class SimulatedPath(WeightPath):
    """Weights along a training that is run in feature space; each call runs it once, to its last dial value.

    Attributes:
        training: what is run.
        new: all new samples, in memory.
        weight: (rows, C) at the start.
        penalty: a quadratic penalty of the training.
    """

    training: GradientDescent | Minibatch
    new: Features
    weight: Float[Tensor, "rows C"]
    penalty: QuadraticPenalty | None

    @property
    def form(self) -> str:
        """How it is computed."""
        return "simulation"

    @property
    def new_spectrum(self) -> Spectrum:
        """Spectrum of the second moments of the new features."""
        return spectrum_of(self.new, len(self.weight))

    def changes(self, dials: list[float]) -> Changes:
        """Delta W after each of the rising steps."""
        steps = [int(dial) for dial in dials]
        phi, y = self.new.gather()
        phi, y = with_bias(phi, len(self.weight)), check_targets(self.new.name, y, self.weight.shape[1])
        # A shorter or longer run of the same training: the schedule and order are prefixes, nothing else changes.
        if isinstance(self.training, GradientDescent):
            return simulate_full_batch(self.training, phi, y, self.weight, self.penalty, steps)
        return simulate_minibatch(self.training, phi, y, self.weight, self.penalty, steps)


def simulate_full_batch(
    training: GradientDescent,
    phi: Float[Tensor, "n rows"],
    y: Tensor,
    weight: Float[Tensor, "rows C"],
    penalty: QuadraticPenalty | None,
    steps: list[int],
) -> Changes:
    """Delta W after each of the rising `steps` of full-batch descent.

    Cost a step: 4 n rows C in the primal, 2 n^2 C in the dual, whichever is less (a penalty forces the primal).

    Source: exact dual of cross-entropy descent, derived for arXiv 2606.18024's linear head.
    """
    if penalty is None and len(phi) < 2 * phi.shape[1]:
        return _dual(training, phi, y, weight, steps)
    columns, error = loss_error(training, y, weight.shape[1], phi)
    return _primal(training, phi, weight, penalty, steps, columns, error, None)


def simulate_minibatch(
    training: Minibatch,
    phi: Float[Tensor, "n rows"],
    y: Tensor,
    weight: Float[Tensor, "rows C"],
    penalty: QuadraticPenalty | None,
    steps: list[int],
) -> Changes:
    """Delta W after each of the rising `steps`, over the very batches of the real run. Cost a step: 4 b rows C."""
    columns, error = loss_error(training, y, weight.shape[1], phi)
    return _primal(training, phi, weight, penalty, steps, columns, error, batches(training, len(phi)))


def batches(training: Minibatch, rows: int) -> Iterator[Int[Tensor, " b"]]:
    """Sample indices of every step: the given order, or that of a seeded `RandomSampler`, epoch after epoch."""
    if training.order is not None:
        for step, given in enumerate(training.order):
            batch = torch.as_tensor(given, dtype=torch.int64)
            if len(batch) == 0 or int(batch.min()) < 0 or int(batch.max()) >= rows:
                raise complaint(
                    f"the batch of step {step} holds {batch.tolist()[:8]}",
                    f"sample indices in 0 .. {rows - 1}, at least one",
                    "Give the order of the same samples that the forecast gets.",
                )
            yield batch
        return
    sampler = RandomSampler(range(rows), generator=torch.Generator().manual_seed(training.seed))
    while True:  # as long as asked: a trajectory may go past training.steps
        yield from torch.split(torch.tensor(list(sampler)), training.batch_size)


def loss_error(
    training: Training, y: Tensor, outputs: int, like: Tensor
) -> tuple[list[int] | None, Callable[[Tensor, Tensor | None], Tensor]]:
    """The outputs that the loss sees (None: all), and `error(logits, indices) = d loss / d logits` over them.

    `error` overwrites the logits it is given.

    Raises:
        ValueError: a label that the loss does not see; probabilities (n, C) that are negative or do not sum to 1.
    """
    y = check_targets("new", y, outputs).to(like.device)
    columns = None if training.classes is None else sorted(training.classes)
    seen = columns if columns is not None else list(range(outputs))
    mean = training.reduction == "mean"
    check_seen("new", y, training.classes)
    if y.ndim == 1:
        place = torch.full((outputs,), -1, dtype=torch.int64, device=like.device)
        place[seen] = torch.arange(len(seen), device=like.device)
        labels = place[y]
        targets = totals = None
    else:
        targets = y[:, seen].to(like)
        totals = targets.sum(1, keepdim=True)  # probabilities sum to 1 only to rounding
        if training.loss == "cross_entropy":
            _check_probabilities(targets)

    def error(logits: Tensor, indices: Tensor | None) -> Tensor:
        if training.loss == "cross_entropy":
            value, scale = torch.softmax(logits, 1), 1 / len(logits) if mean else 1.0
            if totals is not None:
                value *= totals if indices is None else totals[indices]
        else:
            value, scale = logits, data_curvature(training.reduction, len(logits), len(seen))
        if targets is None:
            own = labels if indices is None else labels[indices]
            value[torch.arange(len(value), device=value.device), own] -= 1
        else:
            value -= targets if indices is None else targets[indices]
        return value.mul_(scale)

    return columns, error


def _check_probabilities(targets: Tensor) -> None:
    total = targets.sum(1)
    if bool((targets < 0).any()) or bool(((total - 1).abs() > 1e-4).any()):
        worst = int((total - 1).abs().argmax())
        raise complaint(
            f"new: cross-entropy targets whose row {worst} sums to {float(total[worst]):g}",
            "rows of probabilities: not negative, summing to 1 over the outputs that the loss sees",
            "Give integer labels, normalise the rows, or use loss='squared'.",
        )


def _primal(
    training: GradientDescent | Minibatch,
    phi: Tensor,
    weight: Tensor,
    penalty: QuadraticPenalty | None,
    steps: list[int],
    columns: list[int] | None,
    error: Callable[[Tensor, Tensor | None], Tensor],
    order: Iterator[Tensor] | None,
) -> Changes:
    # Transposed (C, rows), as torch.nn.Linear holds it: for few outputs these products are several times faster.
    start = weight.to(phi).T.contiguous()
    moving = start.clone()
    moving.grad = torch.zeros_like(moving)
    optimizer = sgd(training, [moving]) if isinstance(training, GradientDescent) else training.optimizer([moving])

    def set_gradient(_: int) -> None:
        indices = None if order is None else next(order)
        batch = phi if indices is None else phi[indices]
        gradient = moving.grad
        assert gradient is not None
        if columns is None:
            torch.mm(error(linear(batch, moving), indices).T, batch, out=gradient)
        else:
            gradient.zero_()
            gradient[columns] = error(linear(batch, moving[columns]), indices).T @ batch
        if training.drift_penalty:
            gradient.add_(moving - start, alpha=training.drift_penalty)
        if penalty is not None:
            gradient += penalty.gradient(moving.T).T
        clip_gradients(training, [moving])

    return run_training(training, optimizer, set_gradient, steps, lambda: (moving - start).T.double().contiguous())


def _dual(training: GradientDescent, phi: Tensor, y: Tensor, weight: Tensor, steps: list[int]) -> Changes:
    columns, error = loss_error(training, y, weight.shape[1], phi)
    seen = columns if columns is not None else list(range(weight.shape[1]))
    start = weight.to(phi)
    base, kernel = phi @ start[:, seen], phi @ phi.T
    coefficients, scale = torch.zeros_like(base), phi.new_zeros(())
    optimizer = sgd(training, [coefficients, scale])
    decay, penalty = training.weight_decay, training.drift_penalty

    def set_gradient(_: int) -> None:
        logits = torch.addmm(base * (1 + scale), kernel, coefficients)
        coefficients.grad = error(logits, None).add_(coefficients, alpha=penalty)
        scale.grad = decay + penalty * scale  # the optimiser adds decay * scale itself

    def change() -> Tensor:
        moved = scale.double() * start.double()
        moved[:, seen] += (phi.T @ coefficients).double()
        return moved

    return run_training(training, optimizer, set_gradient, steps, change)


def run_training(
    training: GradientDescent | Minibatch,
    optimizer: torch.optim.Optimizer,
    set_gradient: Callable[[int], None],
    steps: list[int],
    change: Callable[[], Tensor],
) -> Changes:
    """Run to the last of the rising `steps`, and collect the change at each of them."""
    scheduled = not isinstance(training.learning_rate, float | int)
    results: Changes = []
    done = 0
    for stop in steps:
        with torch.no_grad():
            for step in range(done, stop):
                set_gradient(step)
                if scheduled:
                    optimizer.param_groups[0]["lr"] = rate_at(training.learning_rate, step)
                optimizer.step()
            done = stop
            results.append(change())
        if not bool(torch.isfinite(results[-1]).all()):
            raise complaint(
                f"the training diverged within {stop} steps at learning rate {rate_at(training.learning_rate, 0):g}",
                "a training that stays finite",
                "Lower the learning rate, or normalise the features.",
            )
    return results
