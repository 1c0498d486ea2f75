r"""The tangent kernel of a sequence of tasks, block by block: tasks with themselves, and every task with every other.

    K_st = J_s J_t^T,      overlap(s, t) = ||K_st||_F^2 / (||K_ss||_F ||K_tt||_F)

A block between two tasks carries what training one does to the answers on the other; where it is zero, nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import inf, nan

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_finite, require_number

ASYMMETRY = 1e-5
"""How far a block and its transpose may differ, relative to the kernel of their tasks: float32 products do."""

INDEFINITE = 1e-4
"""Eigenvalues may be negative by so much of the largest: products of float32 that add up to zero are."""


@dataclass(frozen=True, eq=False)
class TaskKernels:
    """All blocks of one tangent kernel over the samples of T tasks, float64.

    Attributes:
        blocks: `blocks[s][t]` of task s with task t: (n_s, n_t) where the outputs share one kernel, as those of a
            linear head do and as the trace kernel says of any network; (n_s, C, n_t, C) for the full kernel.
        noise: relative rounding error of the entries. Eigenvalues below rows * noise of the largest count as zero where
            nothing else keeps them from being divided by.

    Raises:
        ValueError: no task; blocks that do not fit each other, are not symmetric, or hold NaN or infinity.
    """

    blocks: tuple[tuple[Tensor, ...], ...]
    noise: float = 2.0**-52

    def __post_init__(self) -> None:
        require_number("noise", self.noise)
        given = [[torch.as_tensor(block).detach() for block in row] for row in self.blocks]
        if not given or any(len(row) != len(given) for row in given):
            raise complaint(
                f"rows of {[len(row) for row in given]} blocks",
                "T rows of T blocks, for T tasks",
                "Give blocks[s][t] for every s and t; the transposes as well.",
            )
        sizes = [row[place].shape[: row[place].ndim // 2] for place, row in enumerate(given)]
        for s, row in enumerate(given):
            for t, block in enumerate(row):
                fits = block.ndim in (2, 4) and block.shape == (*sizes[s], *sizes[t]) and sizes[s][1:] == sizes[t][1:]
                if not fits or 0 in block.shape:
                    raise complaint(
                        f"a block [{s}][{t}] of shape {tuple(block.shape)} beside tasks of {[tuple(n) for n in sizes]}",
                        "(n_s, n_t), or (n_s, C, n_t, C), of the same samples and outputs throughout",
                        "Take all blocks from the same samples of each task.",
                    )
                require_finite(f"block [{s}][{t}]", block)
        exact = max(torch.finfo(b.dtype).eps if b.is_floating_point() else 0.0 for row in given for b in row)
        object.__setattr__(self, "noise", max(float(self.noise), exact))
        object.__setattr__(self, "blocks", tuple(tuple(block.double() for block in row) for row in given))
        self._require_symmetric()

    def _require_symmetric(self) -> None:
        for s, t in combinations_with_replacement(range(len(self)), 2):
            gap = float((self.matrix(s, t) - self.matrix(t, s).T).norm())
            if gap**2 > ASYMMETRY**2 * float(self.matrix(s, s).norm() * self.matrix(t, t).norm()):
                raise complaint(
                    f"blocks [{s}][{t}] and [{t}][{s}] that differ by {gap:.3g}",
                    "transposes of each other",
                    "Take both from one kernel at the same parameters.",
                )

    @staticmethod
    def of_rows(rows: Sequence[Sequence[Tensor]], noise: float = 2.0**-52) -> "TaskKernels":
        """From the blocks of each task with the tasks from itself on, as `joint_kernel` gives them."""

        def block(s: int, t: int) -> Tensor:
            if t >= s:
                return rows[s][t - s]
            found = rows[t][s - t]
            return found.T if found.ndim == 2 else found.permute(2, 3, 0, 1)

        return TaskKernels(tuple(tuple(block(s, t) for t in range(len(rows))) for s in range(len(rows))), noise)

    @staticmethod
    def of_features(features: Sequence[Tensor], *, bias: bool = True) -> "TaskKernels":
        """Of a linear head on frozen features: `K_st = phi_s phi_t^T`, plus 1 for a bias. Cost: 2 d n^2.

        Args:
            features: (n_t, d) of each task.
            bias: whether the head has one.

        Raises:
            ValueError: features that do not fit each other.
        """
        wide = [phi.detach().double() for phi in features]
        if len({phi.shape[1:] for phi in wide}) != 1 or wide[0].ndim != 2:
            raise complaint(
                f"features of shapes {[tuple(phi.shape) for phi in wide]}",
                "(n_t, d) for each task, of one width",
                "Take the features of all tasks from the same layer.",
            )
        return TaskKernels(tuple(tuple(a @ b.T + float(bias) for b in wide) for a in wide))

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def full(self) -> bool:
        """Whether outputs have blocks of their own, (n_s, C, n_t, C)."""
        return self.blocks[0][0].ndim == 4

    def samples(self, task: int) -> int:
        """Number of samples n of a task."""
        return len(self.blocks[task][task])

    def matrix(self, s: int, t: int) -> Float[Tensor, "rows columns"]:
        """Block of task s with task t as a matrix: (n_s, n_t), or (n_s C, n_t C) sample by sample."""
        block = self.blocks[s][t]
        return block.reshape(block.shape[: block.ndim // 2].numel(), -1)

    def joint(self) -> Float[Tensor, "rows rows"]:
        """The kernel of all samples of all tasks, as a matrix."""
        tasks = range(len(self))
        return torch.cat([torch.cat([self.matrix(s, t) for t in tasks], 1) for s in tasks])

    def eigen(self, task: int | None = None) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows rows"]]:
        """Eigenvalues, rising, and eigenvectors of a task's own block, or of `joint()`; 0 where they are rounding.

        Raises:
            ValueError: a clearly negative eigenvalue.

        Cost: about 9 rows^3.
        """
        values, vectors = torch.linalg.eigh(self.joint() if task is None else self.matrix(task, task))
        if float(values[0]) < -INDEFINITE * float(values.abs().max()):
            raise complaint(
                f"a kernel with eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}",
                "a positive semi-definite matrix",
                "Give J J^T, or phi phi^T, of the samples.",
            )
        return torch.where(values > len(values) * self.noise * values[-1], values, 0.0), vectors

    def overlap(self, s: int, t: int) -> float:
        """`||K_st||_F^2 / (||K_ss||_F ||K_tt||_F)`, in [0, 1]: 0 where the tasks' tangent features are orthogonal.

        A mean that all features share makes it large for any pair; `forgetcast.tangent.spectrum.kernel_overlap` gives
        the principal angles. Source: the NTK overlap of Doan et al., arXiv 2010.04003, weighted by energy.
        """
        sizes = float(self.matrix(s, s).norm() * self.matrix(t, t).norm())
        return float(self.matrix(s, t).square().sum()) / sizes if sizes > 0 else 0.0

    def reduced(self) -> "TaskKernels":
        """The mean over equal outputs, (n_s, n_t) blocks: the trace kernel."""
        if not self.full:
            return self
        outputs = self.blocks[0][0].shape[1]
        mean = tuple(tuple(torch.einsum("icjc->ij", block) / outputs for block in row) for row in self.blocks)
        return TaskKernels(mean, self.noise)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each pair of tasks: `size`, root mean square entry of the block, and `overlap`."""
        rows = [
            {
                "first": s,
                "second": t,
                "size": float(self.matrix(s, t).square().mean().sqrt()),
                "overlap": self.overlap(s, t),
            }
            for s, t in combinations_with_replacement(range(len(self)), 2)
        ]
        return pd.DataFrame(rows).set_index(["first", "second"])

    def shift(self, after: "TaskKernels") -> pd.DataFrame:
        r"""How far every block moved from here to another state of the model.

            change = ||K_after - K|| / ||K||,      alignment = <K_after, K> / (||K_after|| ||K||)

        The theory of gaps holds the tangent still: it needs changes near 0.

        Args:
            after: of the same samples, after a training.

        Returns:
            A row for each pair of tasks: `before` and `after`, root mean square entries; `change` (infinite where the
            block was zero and is not), `alignment` (NaN where one of them is zero); `overlap_before`, `overlap_after`.

        Raises:
            ValueError: kernels of other samples, or one full and one trace kernel.

        Source: kernel distance of Fort et al., arXiv 2010.15110.
        """
        shapes = [[tuple(kernels.blocks[s][s].shape) for s in range(len(kernels))] for kernels in (self, after)]
        if shapes[0] != shapes[1]:
            raise complaint(
                f"blocks {shapes[0]} before and {shapes[1]} after",
                "kernels of the same samples, of one kind",
                "Call task_kernels with the same tasks and the same `trace` both times.",
            )
        rows = []
        for s, t in combinations_with_replacement(range(len(self)), 2):
            was, now = self.matrix(s, t), after.matrix(s, t)
            size, other, moved = float(was.norm()), float(now.norm()), float((now - was).norm())
            rows.append(
                {
                    "first": s,
                    "second": t,
                    "before": size / was.numel() ** 0.5,
                    "after": other / was.numel() ** 0.5,
                    "change": moved / size if size > 0 else (inf if moved > 0 else 0.0),
                    "alignment": float((was * now).sum()) / (size * other) if size * other > 0 else nan,
                    "overlap_before": self.overlap(s, t),
                    "overlap_after": after.overlap(s, t),
                }
            )
        return pd.DataFrame(rows).set_index(["first", "second"])


def two_axes(values: Tensor) -> Tensor:
    """(n, C) as it is, and (n,) as (n, 1)."""
    return values[:, None] if values.ndim == 1 else values
