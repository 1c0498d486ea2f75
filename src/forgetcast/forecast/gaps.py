r"""Generalisation gaps of a lazy sequence of tasks: what later tasks do to each, bounded, and what drives it.

With `L_t(f) = ||f(X_t) - Y_t||^2 / n_t` the mean squared error of task t (summed over outputs) after all T tasks,

    L_t(f_T) <= 2/n_t [ ||penalty (K_tt + penalty I)^{-1} r_t||^2 + (T - t) sum_{k > t} ||K^(k)_tk a_k||^2 ]
    Rad_t    <= sum_k 1/n_t sqrt( r_k^T (K_kk + penalty I)^{-1} r_k  tr K^(k)_tt )

and, for a loss that is rho-Lipschitz, at most c and no larger than the squared error, with probability 1 - delta

    E loss of task t <= L_t(f_T) + 2 rho Rad_t + 3 c sqrt(log(2/delta) / (2 n_t))

The second and third are bounds over a class of functions, seldom near the error itself, and the radii of the class are
read off the same samples. `forgetcast.forecast.expected` has estimates: the errors in the mean over draws. Source:
NTK-CL, arXiv 2407.17120, whose ingredients these are; derived here, with the standard argument for the last two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_number
from forgetcast.forecast.expected import ExpectedErrors, expected_errors, populations
from forgetcast.forecast.lazy import LazyTask, lazy_drift, require_sequence
from forgetcast.forecast.learning_curve import LearningCurve, learning_curve, target_spectrum


@dataclass(frozen=True, eq=False)
class TaskGaps:
    """Both gaps of every task of a lazy sequence.

    Attributes:
        tasks: of the sequence, each as it stands at its start.

    Raises:
        ValueError: tasks that are not one whole sequence in order.
    """

    tasks: tuple[LazyTask, ...]

    def __post_init__(self) -> None:
        require_sequence(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def drift(self, task: int, after: int | None = None) -> Float[Tensor, "n C"]:
        """Change of a task's outputs since its own training, see `lazy_drift`."""
        return lazy_drift(self.tasks, task, after)

    def residual(self, task: int) -> Float[Tensor, "n C"]:
        """`f_T(X_task) - Y_task` after the whole sequence."""
        return self.tasks[task].own_residual + self.drift(task)

    def rademacher(self, task: int) -> float:
        """Bound of the empirical Rademacher complexity of all functions that steps of these lengths reach."""
        own = self.tasks[task]
        total = 0.0
        for step in self.tasks:
            trace = float(step.kernels.matrix(task, task).trace()) * step.coefficients.shape[1]
            total += sqrt(max(step.step_bound * trace, 0.0)) / own.samples
        return total

    @property
    def table(self) -> pd.DataFrame:
        """A row for each task, all mean squares over its samples, summed over outputs.

        `samples`; `own`, its error after its own training; `end`, after the last task; the two terms of the bound,
        `own_term` = 2 own and `interplay_term`; their sum `bound`, never below `end`; `rademacher`.
        """
        rows = []
        for place, task in enumerate(self.tasks):
            later = self.tasks[place + 1 :]
            own = float(task.own_residual.square().sum()) / task.samples
            changes = sum(float(step.change(place).square().sum()) for step in later) / task.samples
            rows.append(
                {
                    "samples": task.samples,
                    "own": own,
                    "end": float(self.residual(place).square().sum()) / task.samples,
                    "own_term": 2 * own,
                    "interplay_term": 2 * len(later) * changes,
                    "bound": 2 * own + 2 * len(later) * changes,
                    "rademacher": self.rademacher(place),
                }
            )
        return pd.DataFrame(rows).rename_axis("task")

    @property
    def pairs(self) -> pd.DataFrame:
        """The three factors, measured for each old task and each that follows it.

        `samples_old` and `samples_new`; `overlap`, the kernel's overlap of both at the start of the new one, in [0, 1]
        (`TaskKernels.overlap`: 0 where the tasks' tangent features are orthogonal); `penalty` of the new task and
        `penalty_share`, its mean `penalty / (s + penalty)` over the eigenvalues s of the new task's kernel: 0 where it
        holds nothing back, 1 where nothing is learnt. Then what they do: `step`, how far the new task moves the
        parameters, and `change`, the mean square by which it moves the old task's outputs.
        """
        rows = [
            {
                "old": old,
                "new": new,
                "samples_old": self.tasks[old].samples,
                "samples_new": step.samples,
                "overlap": step.kernels.overlap(old, new),
                "penalty": step.penalty,
                "penalty_share": step.penalty_share,
                "step": sqrt(max(step.step_square, 0.0)),
                "change": float(step.change(old).square().sum()) / self.tasks[old].samples,
            }
            for new, step in enumerate(self.tasks)
            for old in range(new)
        ]
        names = ["samples_old", "samples_new", "overlap", "penalty", "penalty_share", "step", "change"]
        return pd.DataFrame(rows, columns=["old", "new", *names]).set_index(["old", "new"])

    def bounds(self, *, lipschitz: float, largest: float, confidence: float = 0.95) -> pd.DataFrame:
        r"""Bound of the expected loss on new samples of each task, after the last one.

        Args:
            lipschitz: rho of the loss in the outputs of a sample. The squared error cut off at b^2 has 2 b ...
            largest: ... and c = b^2, the most that the loss is.
            confidence: 1 - delta, with which each row holds.

        Returns:
            A row for each task: `end`, its error on its own samples; `complexity`, 2 rho Rad, times sqrt 2 for several
            outputs (Maurer, arXiv 1605.00251); `deviation`, 3 c sqrt(log(2/delta) / (2 n)); and their sum, `bound`.

        Raises:
            ValueError: numbers that are not above 0; a confidence that is not between 0 and 1.
        """
        require_number("lipschitz", lipschitz, strict=True)
        require_number("largest", largest, strict=True)
        if not 0 < confidence < 1:
            raise complaint(f"got confidence={confidence!r}", "a number between 0 and 1", "0.95 is usual.")
        contraction = 1.0 if self.tasks[0].residual.shape[1] == 1 else sqrt(2)
        table = self.table
        found = table[["end"]].copy()
        found["complexity"] = 2 * lipschitz * contraction * table["rademacher"]
        found["deviation"] = [3 * largest * sqrt(log(2 / (1 - confidence)) / (2 * task.samples)) for task in self.tasks]
        found["bound"] = found.sum(axis=1)
        return found

    def learning_curve(self, task: int, samples: int | Sequence[int]) -> LearningCurve:
        """The task-specific gap if only so many of this task's samples were drawn to train on, the others to test.

        Of what the task has to learn at its start, by its own kernel (of a full one the mean over equal outputs) and
        penalty. See `forgetcast.forecast.learning_curve`.
        """
        step = self.tasks[task]
        kernel = step.kernels.reduced().blocks[task][task]
        return learning_curve(target_spectrum(kernel, -step.residual, step.kernels.noise), samples, step.penalty)

    def expected(self, samples: Sequence[int]) -> ExpectedErrors:
        """Both gaps if only so many of each task's samples were drawn to train on, the others to test.

        For one tangent throughout, as `lazy_tasks` has it. See `forgetcast.forecast.expected`.

        Raises:
            ValueError: tasks whose kernels or penalties differ; as many samples as a task has, or more.
        """
        first = self.tasks[0]
        if any(task.kernels is not first.kernels or task.penalty != first.penalty for task in self.tasks):
            raise complaint(
                "tasks with kernels or penalties of their own",
                "one tangent and one penalty for the whole sequence",
                "Use lazy_tasks(kernels, residuals, penalty).",
            )
        targets = [
            sum((step.change(place) for step in self.tasks[:place]), -task.residual)
            for place, task in enumerate(self.tasks)
        ]
        return expected_errors(populations(first.kernels.reduced(), targets), samples, first.penalty)
