r"""A sequence of tasks in the lazy regime: recursive kernel ridge regression in closed form, from blocks of the kernel.

Task k minimises `1/2 ||f(X_k) - Y_k||^2 + penalty/2 ||theta - theta_start||^2` with the tangent frozen at its start,
where its kernel is K^(k) and its residual `r_k = f_{k-1}(X_k) - Y_k`. With `a_k = (K^(k)_kk + penalty I)^{-1} r_k`

    f_T(x) = f_0(x) - sum_{k <= T} K^(k)(x, X_k) a_k

and everything here follows from it. Exact where outputs are linear in what trains; of a network it says what the
tangent says. A penalty of 0 takes the pseudo-inverse: the solution nearest to the start. Sources: Bennani et al., arXiv
2006.11942, for this form; NTK-CL, arXiv 2407.17120, for its use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_finite, require_number
from forgetcast.tangent.blocks import TaskKernels, two_axes


@dataclass(frozen=True, eq=False)
class LazyTask:
    """One task of a lazy sequence, as it stands when its training starts.

    Attributes:
        kernels: of all tasks of the sequence, with the tangent at the start of this one.
        place: of this task in the sequence, from 0.
        residual: (n, C) outputs minus targets at the start; (n,) is taken as (n, 1).
        penalty: of the squared distance from the start, for the summed loss with its half; 0 for none.

    Raises:
        ValueError: a residual that does not fit the kernel, NaN or infinity, a negative penalty.
    """

    kernels: TaskKernels
    place: int
    residual: Tensor
    penalty: float

    def __post_init__(self) -> None:
        require_number("penalty", self.penalty)
        if self.place not in range(len(self.kernels)):
            raise complaint(
                f"got place={self.place} in a sequence of {len(self.kernels)} tasks",
                f"a place in 0 .. {len(self.kernels) - 1}",
                "Count from 0.",
            )
        residual = two_axes(torch.as_tensor(self.residual).detach().double())
        shape = self.kernels.blocks[self.place][self.place].shape
        fits = shape[:2] == residual.shape if self.kernels.full else residual.ndim == 2 and shape[0] == len(residual)
        if not fits or residual.numel() == 0:
            raise complaint(
                f"a residual of shape {tuple(self.residual.shape)} for a kernel {tuple(shape)} of task {self.place}",
                f"({shape[0]}, {shape[1] if self.kernels.full else 'C'})",
                "Give outputs minus targets of the very samples of this task's kernel.",
            )
        require_finite(f"residual of task {self.place}", residual)
        object.__setattr__(self, "residual", residual.to(self.kernels.matrix(0, 0)))

    @property
    def samples(self) -> int:
        """Number of samples n."""
        return len(self.residual)

    @cached_property
    def coefficients(self) -> Float[Tensor, "rows columns"]:
        """`a = (K_kk + penalty I)^{-1} r`, (n, C); (n C, 1) for the full kernel. Cost: about 9 rows^3, once."""
        return self._filtered(self._inverse)

    @cached_property
    def own_residual(self) -> Float[Tensor, "n C"]:
        """What the training leaves of its own residual: `f_k(X_k) - Y_k = penalty (K_kk + penalty I)^{-1} r`."""
        shifted = self._spectrum[0] + self.penalty
        return self._filtered(torch.where(shifted > 0, self.penalty / shifted, 1.0)).view_as(self.residual)

    @property
    def penalty_share(self) -> float:
        """Mean of `penalty / (s + penalty)` over the eigenvalues s of the own kernel: what the penalty holds back."""
        return float((self.penalty * self._inverse).mean())

    @cached_property
    def step_square(self) -> float:
        """`||theta_k - theta_{k-1}||^2 = a^T K_kk a`."""
        values, components = self._spectrum[0], self._components
        return float((values * self._inverse**2) @ components.square().sum(1))

    @cached_property
    def step_bound(self) -> float:
        """`r^T (K_kk + penalty I)^{-1} r`, at least `step_square`; equal where the penalty is 0."""
        return float(self._inverse @ self._components.square().sum(1))

    def change(self, task: int) -> Float[Tensor, "n C"]:
        """What the training adds to the outputs of a task: `-K^(k)_{task, k} a_k`, (n_task, C)."""
        return -(self.kernels.matrix(task, self.place) @ self.coefficients).view(self.kernels.samples(task), -1)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        return self.kernels.eigen(self.place)

    @cached_property
    def _inverse(self) -> Float[Tensor, " rows"]:
        """`1 / (s + penalty)`; 0 for directions without a kernel where there is no penalty."""
        shifted = self._spectrum[0] + self.penalty
        return torch.where(shifted > 0, 1 / shifted, 0.0)

    @cached_property
    def _components(self) -> Float[Tensor, "rows columns"]:
        vectors = self._spectrum[1]
        return vectors.T @ self.residual.reshape(len(vectors), -1)

    def _filtered(self, values: Float[Tensor, " rows"]) -> Float[Tensor, "rows columns"]:
        return self._spectrum[1] @ (values[:, None] * self._components)


def lazy_tasks(kernels: TaskKernels, residuals: Sequence[Tensor], penalty: float) -> tuple[LazyTask, ...]:
    r"""A whole sequence from what is known at its start, with one tangent for all of it.

        r_k = f_0(X_k) - Y_k - sum_{j < k} K_kj a_j

    Exact for linear heads. Where the tangent is measured again before each task, make each `LazyTask` from the kernels
    and the residual measured there.

    Args:
        kernels: of all tasks, at the start of the first.
        residuals: `f_0(X_k) - Y_k` of each task, (n_k, C).
        penalty: of every task, toward its own start.

    Raises:
        ValueError: as for `LazyTask`; not one residual a task.

    Cost: an eigen-decomposition a task, and a product for each pair.
    """
    if len(residuals) != len(kernels):
        raise complaint(
            f"{len(residuals)} residuals for {len(kernels)} tasks", "one for each task", "Give them in training order."
        )
    tasks: list[LazyTask] = []
    for place, start in enumerate(residuals):
        task = LazyTask(kernels, place, start, penalty)
        if tasks and task.residual.shape[1] != tasks[0].residual.shape[1]:
            raise complaint(
                f"residuals of shapes {[tuple(residual.shape) for residual in residuals]}",
                "(n_k, C) with one C",
                "Give the residuals of all outputs of the model for every task.",
            )
        residual = sum((earlier.change(place) for earlier in tasks), task.residual)
        tasks.append(LazyTask(kernels, place, residual, penalty))
    return tuple(tasks)


def lazy_outputs(start: Tensor, tasks: Sequence[LazyTask], cross: Sequence[Tensor]) -> Float[Tensor, "m C"]:
    r"""Outputs on any points after the whole sequence: `f_T(x) = f_0(x) - sum_k K^(k)(x, X_k) a_k`.

    Args:
        start: (m, C) outputs there before the first task; (m,) is taken as (m, 1).
        tasks: of the sequence.
        cross: for each task, `K^(k)(x, X_k)` of these points with its samples: (m, n_k), or (m, C, n_k, C).

    Raises:
        ValueError: blocks or outputs that do not fit, NaN or infinity.
    """
    if len(cross) != len(tasks):
        raise complaint(f"{len(cross)} blocks for {len(tasks)} tasks", "one for each task", "Give K(x, X_k) of each.")
    outputs = two_axes(start.detach().double())
    require_finite("outputs at the start", outputs)
    for task, block in zip(tasks, cross, strict=True):
        own = task.kernels.blocks[task.place][task.place].shape
        wanted = (*outputs.shape, *own[2:]) if task.kernels.full else (len(outputs), own[0])
        if block.shape != wanted or outputs.shape[1:] != task.residual.shape[1:]:
            raise complaint(
                f"a block {tuple(block.shape)} and outputs {tuple(outputs.shape)} beside task {task.place} "
                f"with residual {tuple(task.residual.shape)}",
                f"a block {tuple(wanted)} and outputs (m, {task.residual.shape[1]})",
                "Take the kernel of the new points with this task's samples, in this order.",
            )
        require_finite(f"block of task {task.place}", block)
        rows = block.detach().to(task.coefficients).reshape(-1, len(task.coefficients))
        outputs = outputs - (rows @ task.coefficients).view_as(outputs)
    return outputs


def lazy_drift(tasks: Sequence[LazyTask], task: int, after: int | None = None) -> Float[Tensor, "n C"]:
    r"""Change of a task's outputs since its own training: `f_after(X_task) - f_task(X_task)`.

        - sum_{task < k <= after} K^(k)_{task, k} a_k           zero if all these blocks are

    Args:
        tasks: of the sequence.
        task: whose outputs, from 0.
        after: the last task that has been trained; None for the last of all.
    """
    last = len(tasks) - 1 if after is None else after
    require_sequence(tasks)
    if not 0 <= task <= last < len(tasks):
        raise complaint(
            f"got task={task} and after={after} in a sequence of {len(tasks)} tasks",
            "0 <= task <= after < tasks",
            "Count from 0.",
        )
    drift = torch.zeros_like(tasks[task].residual)
    for later in tasks[task + 1 : last + 1]:
        drift = drift + later.change(task)
    return drift


def require_sequence(tasks: Sequence[LazyTask]) -> None:
    """Raise unless these are all tasks of one sequence, in order, with kernels of the same samples."""
    if not tasks or [task.place for task in tasks] != list(range(len(tasks))):
        raise complaint(
            f"tasks at the places {[task.place for task in tasks]}",
            "all tasks of a sequence from 0 on, in order",
            "Give every task once, in training order.",
        )
    sizes = {tuple(task.kernels.blocks[t][t].shape for t in range(len(task.kernels))) for task in tasks}
    outputs = {task.residual.shape[1] for task in tasks}
    if len(sizes) != 1 or len(next(iter(sizes))) != len(tasks) or len(outputs) != 1:
        raise complaint(
            f"{len(tasks)} tasks with kernels of {sorted(sizes)} and {sorted(outputs)} outputs",
            "kernels over the same samples of all these tasks, and equally many outputs",
            "Take the kernels at each task's start from the same samples.",
        )
