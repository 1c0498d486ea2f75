"""A quadratic penalty on the weights of a linear head, in factored form."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_finite


@dataclass(frozen=True, eq=False)
class QuadraticPenalty:
    r"""Adds `1/2 ||root W - target||_F^2 + constant` to the loss.

    Attributes:
        root: (r, rows) float64; rows = d + 1 with a bias.
        target: (r, C) float64.
        constant: what compression has taken out of the norm; it moves no gradient.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity.
    """

    root: Float[Tensor, "r rows"]
    target: Float[Tensor, "r C"]
    constant: float = 0.0

    def __post_init__(self) -> None:
        for name in ("root", "target"):
            values = torch.as_tensor(getattr(self, name)).detach().double()
            require_finite(f"penalty {name}", values)
            object.__setattr__(self, name, values)
        if self.root.ndim != 2 or self.target.ndim != 2 or len(self.root) != len(self.target):
            raise complaint(
                f"a penalty with root {tuple(self.root.shape)} and target {tuple(self.target.shape)}",
                "root (r, rows) and target (r, C)",
                "Give one target row for each row of the root.",
            )

    def value(self, weight: Float[Tensor, "rows C"]) -> float:
        """The penalty at `weight`. Cost: 2 r rows C."""
        return 0.5 * float((self.root @ weight.to(self.root) - self.target).square().sum()) + self.constant

    def gradient(self, weight: Float[Tensor, "rows C"]) -> Float[Tensor, "rows C"]:
        """Its gradient `root^T (root W - target)` in the type of `weight`."""
        root = self.root.to(weight)
        return root.T @ (root @ weight - self.target.to(weight))

    def hessian(self) -> Float[Tensor, "rows rows"]:
        """`root^T root`, the same for every output."""
        return self.root.T @ self.root

    def compressed(self, most: int) -> "QuadraticPenalty":
        """The same penalty in at most `most` rows: exact while `most` reaches the rank, else the weakest rows go.

        SVD root = U S V^T, root' = S V^T, target' = U^T target; what U does not span goes into the constant.
        """
        left, singular, right = torch.linalg.svd(self.root, full_matrices=False)
        target = left.T @ self.target
        lost = float(self.target.square().sum() - target.square().sum())
        kept = min(most, len(singular))
        return QuadraticPenalty(
            singular[:kept, None] * right[:kept], target[:kept], self.constant + max(0.5 * lost, 0.0)
        )
