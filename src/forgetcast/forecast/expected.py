r"""Both gaps of a sequence of tasks in the mean over its samples, before any of them is drawn.

Kernel ridge regression task after task, each toward the weights before it. In the kernel's feature space task k has
second moments S_k, the target theta_k and n_k samples. With kappa, d and d_2 of its spectrum (`learning_curve`),
`D_k = kappa (kappa + n_k S_k)^{-1}` and `U = E (theta - theta_k)(theta - theta_k)^T` before its training, its error on
new samples, label noise s^2 included, and U after it are

    e_k = (tr(U D_k S_k D_k) + s^2) / (1 - d_2/n_k)
    U  <-  D_k U D_k + e_k (n_k / kappa^2) D_k S_k D_k

while the mean of `theta - theta_k` is multiplied by D_k. From mean and U the error on any task t is
`tr(S_t E (theta - theta_t)(theta - theta_t)^T)`. The factors are in plain sight: n_k and the penalty in kappa, and the
tasks' overlap in the products S_t D_k S_k D_k, since what task k does not see, S_k S_t = 0, it leaves as it is.

Where a task's samples are drawn from a pool, they fit better than the others ever since: a residual e that sample i
would have had after its task, left out of it, counts on its output after task K as `-b_K e`, with
`b_K = tr(D_K ... D_{t+1} (kappa + n S_t)^{-1} S_t)`. That is taken off, so all errors are on samples not drawn.

Derived here from the deterministic equivalents of one task (Simon et al., arXiv 2110.03922); tasks with equal inputs
and no penalty are those of Karakida and Akaho, arXiv 2112.01653.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isinf

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_finite, require_integer, require_number
from forgetcast.forecast.learning_curve import Resolution, require_noise, resolution
from forgetcast.tangent.blocks import TaskKernels, two_axes


@dataclass(frozen=True, eq=False)
class Population:
    """A task as its samples are distributed.

    Attributes:
        moments: S (p, p), second moments of the features, positive semi-definite.
        target: theta (p, C), by which `phi theta` is nearest to the task's targets.
        unlearnable: mean squared distance that is left, summed over outputs.
        pool: m, if these are of m samples, from which the training's are drawn; None if of a distribution.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity, moments that are not symmetric.
    """

    moments: Tensor
    target: Tensor
    unlearnable: float = 0.0
    pool: int | None = None

    def __post_init__(self) -> None:
        moments, target = self.moments.detach().double(), two_axes(self.target.detach().double())
        if moments.ndim != 2 or moments.shape != (len(target), len(target)) or target.ndim != 2 or not target.numel():
            raise complaint(
                f"moments {tuple(self.moments.shape)} and a target {tuple(self.target.shape)}",
                "(p, p) and (p, C)",
                "Give phi^T phi / n, and one weight for each feature.",
            )
        require_finite("moments", moments)
        require_finite("target", target)
        require_number("unlearnable", self.unlearnable)
        if self.pool is not None:
            require_integer("pool", self.pool, least=2)
        if float((moments - moments.T).norm()) > 1e-6 * float(moments.norm()):
            raise complaint("moments that are not symmetric", "second moments", "Give phi^T phi / n.")
        object.__setattr__(self, "moments", moments)
        object.__setattr__(self, "target", target)


@dataclass(frozen=True, eq=False)
class ExpectedErrors:
    """Mean squared errors in the mean over draws of all tasks' samples, summed over outputs, label noise left out.

    Attributes:
        errors: (T + 1, T): row 0 before the first task, row k + 1 after task k; column t on samples of task t that are
            not drawn.
        training: (T,) of task k on its own training samples after its training, label noise included.
        samples: n of each task.
    """

    errors: Float[Tensor, "stages T"]
    training: Float[Tensor, " T"]
    samples: tuple[int, ...]

    @property
    def table(self) -> pd.DataFrame:
        """Both gaps of each task, a row for each.

        `samples`; `own` error after its own training, and that on the `training` samples; their difference, the
        task-specific gap `specific`; error at the `end`, and its growth since `own`, the task-interplay gap
        `interplay`.
        """
        own = self.errors[1:].diagonal()
        columns = {
            "own": own,
            "training": self.training,
            "specific": own - self.training,
            "end": self.errors[-1],
            "interplay": self.errors[-1] - own,
        }
        frame = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
        frame.insert(0, "samples", self.samples)
        return frame.rename_axis("task")


def expected_errors(
    tasks: Sequence[Population], samples: Sequence[int], penalty: float, *, noise: float = 0.0
) -> ExpectedErrors:
    """Errors on every task after every task of a sequence, in the mean over its samples.

    Args:
        tasks: in training order, in one feature space; weights start at 0.
        samples: n of each; fewer than its pool has.
        penalty: of every task, toward the weights before it; for the summed loss with its half. 0 for none.
        noise: standard deviation of the label noise of each output; 0 for pools, whose targets hold theirs.

    Raises:
        ValueError: what does not fit; as many samples as features without a penalty, where the error is infinite.

    Cost: an eigen-decomposition p^3 a task, and some products p^3 for each pair.
    """
    _require_fit(tasks, samples)
    require_number("penalty", penalty)
    for task in tasks:
        require_noise(noise, task.pool)
    now = _Weights(torch.zeros_like(tasks[0].target), torch.zeros_like(tasks[0].moments))
    label_noise = now.mean.shape[1] * noise**2
    learnt: list[_Learnt] = []
    errors, training = [[now.error(task) for task in tasks]], []
    for task, n in zip(tasks, samples, strict=True):
        values, vectors = torch.linalg.eigh(task.moments)
        values = torch.where(values > len(values) * torch.finfo(values.dtype).eps * values[-1], values, 0.0)
        seen = resolution(values, n, penalty, task.pool)
        missed = (vectors * seen.missed) @ vectors.T
        rotated = vectors.T @ now.square(task.target) @ vectors
        whole = seen.error(float((rotated.diagonal() * values) @ seen.missed.square()) + task.unlearnable + label_noise)
        if isinf(whole):
            raise complaint(
                f"{n} samples for {n} features without a penalty",
                "fewer or more samples, or a penalty",
                "The expected error is infinite here.",
            )
        spread = n * whole * seen.left * torch.where(values > 0, seen.learnt.square() / values, 0.0)
        now = _Weights(
            task.target + missed @ (now.mean - task.target),
            missed @ now.covariance @ missed + (vectors * spread) @ vectors.T,
        )
        learnt = [earlier.after(missed, task.target) for earlier in learnt]
        learnt.append(_Learnt.at_end(task, now, (vectors * seen.learnt) @ vectors.T, whole, seen))
        errors.append([old.error(now) for old in learnt] + [now.error(new) for new in tasks[len(learnt) :]])
        training.append(seen.training_error(whole))
    return ExpectedErrors(now.mean.new_tensor(errors), now.mean.new_tensor(training), tuple(samples))


def populations(kernels: TaskKernels, targets: Sequence[Tensor]) -> tuple[Population, ...]:
    r"""Tasks from pools of samples, which stand for their distributions: the feature space is that of the joint kernel.

        K = Phi Phi^T,    S_k = Phi_k^T Phi_k / m_k,    theta_k = Phi_k^+ y_k

    Args:
        kernels: of the pools; (m_s, m_t) blocks, of a network those of the trace kernel.
        targets: (m_k, C) what each task is to learn from the start on: targets minus outputs at the start.

    Raises:
        ValueError: the full kernel of several outputs; targets that do not fit.

    Cost: about 9 m^3, for m samples of all pools.
    """
    if kernels.full:
        raise complaint(
            "the full kernel of several outputs", "one kernel for all of them", "Take task_kernels(..., trace=True)."
        )
    if [len(y) for y in targets] != [kernels.samples(task) for task in range(len(kernels))]:
        raise complaint(
            f"targets of {[len(y) for y in targets]} samples for pools of "
            f"{[kernels.samples(task) for task in range(len(kernels))]}",
            "one row for each sample",
            "Give the targets of the very samples of each kernel.",
        )
    values, vectors = kernels.eigen()
    features = (vectors * values.sqrt())[:, values > 0]
    found = []
    for task, (phi, y) in enumerate(zip(torch.split(features, [len(y) for y in targets]), targets, strict=True)):
        own, directions = kernels.eigen(task)
        inverse = torch.where(own > 0, 1 / own, 0.0)
        wanted = two_axes(y.detach().to(phi))
        theta = phi.T @ (directions @ (inverse[:, None] * (directions.T @ wanted)))
        rest = float((wanted - phi @ theta).square().sum()) / len(phi)
        found.append(Population(phi.T @ phi / len(phi), theta, rest, len(phi)))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class _Weights:
    """Mean (p, C) and covariance (p, p), summed over outputs, of the weights over draws of samples."""

    mean: Tensor
    covariance: Tensor

    def square(self, centre: Tensor) -> Tensor:
        """Second moments about a centre."""
        return self.covariance + (self.mean - centre) @ (self.mean - centre).T

    def error(self, task: Population) -> float:
        """Mean squared error on a task that has not been drawn from yet."""
        return float((task.moments * self.square(task.target)).sum()) + task.unlearnable


@dataclass(frozen=True, eq=False)
class _Learnt:
    """What is known of a task since its training; `then` is at its end.

    `own` is `(kappa + n S)^{-1} S`, `path` the product of the later tasks' D, `mean` (p, C) that of `theta - target`
    then, and `cross` (p, p) that of `(theta - target)(theta then - target)^T`.
    """

    task: Population
    own: Tensor
    path: Tensor
    mean: Tensor
    cross: Tensor
    left_out: float
    drawn: float
    root: float

    @staticmethod
    def at_end(task: Population, now: _Weights, own: Tensor, error: float, seen: Resolution) -> "_Learnt":
        path = torch.eye(len(own), dtype=own.dtype, device=own.device)
        mean = now.mean - task.target
        return _Learnt(task, own, path, mean, now.square(task.target), error, 1 - seen.left, seen.training_root)

    def after(self, missed: Tensor, target: Tensor) -> "_Learnt":
        """After one more task of this D and target."""
        away = target - self.task.target
        cross = missed @ self.cross + (away - missed @ away) @ self.mean.T
        return replace(self, path=missed @ self.path, cross=cross)

    def error(self, now: _Weights) -> float:
        """Mean squared error on the samples that were not drawn; the pool's mean without what is drawn's part."""
        whole = now.error(self.task)
        if self.drawn == 0:
            return whole
        effect = float((self.path * self.own.T).sum())
        both = float((self.task.moments * self.cross).sum()) + self.task.unlearnable
        both = (both + self.drawn * self.root * effect * self.left_out) / (1 - self.drawn * (1 - self.root))
        return whole + self.drawn * (2 * effect * both - effect**2 * self.left_out)


def _require_fit(tasks: Sequence[Population], samples: Sequence[int]) -> None:
    shapes = {tuple(task.target.shape) for task in tasks}
    if len(shapes) != 1 or len(samples) != len(tasks):
        raise complaint(
            f"{len(samples)} sample numbers for {len(tasks)} tasks with targets {sorted(shapes)}",
            "at least one task, all in one feature space, and one number for each",
            "Take the features of all tasks from one kernel.",
        )
    for n in samples:
        require_integer("samples", n, least=1)
