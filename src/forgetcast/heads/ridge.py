"""Ridge regression from streamed moments: the joint solution, whatever the order of tasks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.heads.base import StreamedHead
from forgetcast.tangent.moments import gram

KEPT, HELD = 0, 1


class RecursiveRidge(StreamedHead):
    r"""Ridge regression onto one-hot labels, equal to the joint one on all samples observed.

        (G + penalty I) W^T = B,    G = sum_i phi_i phi_i^T,    B = sum_i phi_i onehot(y_i)^T,    f(phi) = W phi

    Several penalties are a grid to choose from, at each `solve`, on training samples alone: of every class the second
    sample in each run of `held_every` is held out, W is found without them for each penalty, and the penalty of the
    least squared error on them is taken; the final W uses all samples. The error too follows from moments,
    `tr(W G_held W^T) - 2 tr(W B_held) + n_held`, so no sample is stored. The reference implementation holds out of the
    latest task alone; here it is of all tasks, and the choice does not depend on their order.

    Cost: n d^2 to observe; d^3 / 3 + d^2 C to solve; for a grid one eigendecomposition of d x d more, which serves all
    its penalties at 2 d^2 C each; memory d^2, 2 d^2 for a grid.

    Args:
        width: d.
        outputs: C at the start.
        penalty: lambda, or a grid of them.
        held_every: of how many samples one is held out, for a grid.

    Attributes:
        weight: W (C, d).
        penalty: the one in force; NaN until a grid has been chosen from.
        errors: mean squared error on the samples held out, for each penalty of the grid; infinite where the penalty is
            too small for a stable solution.

    Source: ACIL, Zhuang et al., NeurIPS 2022 (arXiv 2205.14922): recursive = joint; RanPAC, McDonnell et al., NeurIPS
    2023 (arXiv 2307.02251), section 4 and algorithm 1: moments and penalty.
    """

    by_output = ("counts", "cross", "weight")
    gram: Float[Tensor, "parts d d"]
    cross: Float[Tensor, "C parts d"]
    weight: Float[Tensor, "C d"]
    penalty: Float[Tensor, ""]
    errors: Float[Tensor, " candidates"]

    def __init__(
        self, width: int, outputs: int = 0, penalty: float | Sequence[float] = 1.0, *, held_every: int = 5
    ) -> None:
        super().__init__(width, outputs)
        self.grid = tuple(penalty) if isinstance(penalty, Sequence) else None
        for value in (penalty,) if self.grid is None else self.grid:
            require_number("penalty", value)
        require_integer("held_every", held_every, least=2)
        if self.grid == ():
            raise complaint("got penalty=()", "a number or a grid of at least one", "Give the penalties to try.")
        self.held_every = held_every
        parts = 1 if self.grid is None else 2
        double = torch.float64
        self.register_buffer("gram", torch.zeros(parts, width, width, dtype=double))
        self.register_buffer("cross", torch.zeros(outputs, parts, width, dtype=double))
        self.register_buffer("weight", torch.zeros(outputs, width, dtype=double))
        self.register_buffer("penalty", torch.tensor(torch.nan if self.grid else penalty, dtype=double))
        self.register_buffer("errors", torch.full((len(self.grid or ()),), torch.nan, dtype=double))

    def absorb(self, phi: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Add to the moments, those held out apart from those kept."""
        part = torch.full_like(labels, KEPT)
        if self.grid is not None:
            part[self._place_in_class(labels) % self.held_every == 1] = HELD
        for i in range(len(self.gram)):
            self.gram[i] += gram(phi[part == i])
        self.cross.index_put_((labels, part), phi, accumulate=True)

    def fit(self) -> None:
        """Choose the penalty where there is a grid, then solve.

        Raises:
            ValueError: no penalty gives a stable solution; no sample could be held out.
        """
        if self.grid is not None:
            self._choose(self.grid)
        weight = ridge(self.gram.sum(0), self.cross.sum(1), float(self.penalty))
        if weight is None:
            raise complaint(
                f"the Gram of {int(self.counts.sum())} samples of width {self.width} plus penalty "
                f"{float(self.penalty):g} is singular in float64",
                "a positive definite matrix",
                "Raise the penalty.",
            )
        self.weight = weight

    def scores(self, phi: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """`phi W^T`."""
        return phi @ self.weight.T

    def _place_in_class(self, labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """How many samples of its class came before each sample: independent of how the stream is cut into batches."""
        own = one_hot(labels, self.outputs).cumsum(0).gather(1, labels[:, None])[:, 0]
        return own - 1 + self.counts[labels]

    def _choose(self, grid: tuple[float, ...]) -> None:
        held = ((self.counts + self.held_every - 2) // self.held_every).sum()
        if held == 0:
            raise complaint(
                "no class has two samples, so none can be held out",
                "a class of at least two samples to choose a penalty from a grid",
                "Give one penalty instead of a grid.",
            )
        values, vectors = torch.linalg.eigh(self.gram[KEPT])
        rotated = self.cross[:, KEPT] @ vectors
        for i, candidate in enumerate(grid):
            shifted = values + candidate
            if shifted[0] <= self.width * torch.finfo(values.dtype).eps * shifted[-1]:
                self.errors[i] = torch.inf  # singular to rounding
                continue
            weight = rotated / shifted @ vectors.T
            squared = ((weight @ self.gram[HELD] - 2 * self.cross[:, HELD]) * weight).sum() + held
            self.errors[i] = squared / held
        best = int(self.errors.argmin())
        self.penalty.fill_(grid[best])


def ridge(G: Float[Tensor, "d d"], B: Float[Tensor, "C d"], penalty: float) -> Float[Tensor, "C d"] | None:
    """`B (G + penalty I)^-1` by Cholesky, or None where the matrix is singular to rounding. Cost: d^3 / 3 + d^2 C."""
    factor, failed = torch.linalg.cholesky_ex(G + penalty * torch.eye(len(G), dtype=G.dtype, device=G.device))
    pivots = factor.diagonal().square()
    if failed or pivots.min() <= len(G) * torch.finfo(G.dtype).eps * pivots.max():
        return None
    return torch.cholesky_solve(B.T, factor).T.contiguous()
