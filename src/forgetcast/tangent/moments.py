"""Second moments of features: all that the primal form needs, and all that a task must leave behind."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.tangent.features import Features, target_matrix

PANELS = 4


@dataclass(frozen=True, eq=False)
class Moments:
    r"""Second moments of a task, enough to forecast its mean drift and loss change without one stored sample.

        S = sum_i phi_i phi_i^T,    B = sum_i phi_i y_i^T,    with phi extended by a constant 1 (the bias)

    Moments of shards and of tasks add: `a + b`.

    Attributes:
        gram: S (d + 1, d + 1) float64; the last row and column belong to the bias.
        cross: B (d + 1, C) float64.
        target_square: sum of squared targets.
        rows: number of samples n.

    Source: theory of the replay-free state, arXiv 2606.18024 (closed form) and its moment form derived here.

    Examples:
        >>> import numpy as np
        >>> features = Features(np.eye(3, dtype=np.float32), np.array([0, 1, 1]))
        >>> moments = Moments.of(features, outputs=2)
        >>> moments.rows, moments.gram.shape, moments.cross.shape
        (3, torch.Size([4, 4]), torch.Size([4, 2]))
    """

    gram: Float[Tensor, "d_bias d_bias"]
    cross: Float[Tensor, "d_bias C"]
    target_square: float
    rows: int

    @staticmethod
    def of(features: Features, outputs: int) -> "Moments":
        """Moments of `features`, read once in blocks. Cost: n d (d + 2 C) multiply-adds; memory d^2 + d C.

        Raises:
            ValueError: whatever `Features` refuses, and targets that do not fit `outputs`.
        """
        total: Moments | None = None
        for phi, y in features.blocks():
            targets = target_matrix(features.name, y, outputs, phi)
            cross = torch.cat([phi.T @ targets, targets.sum(0, keepdim=True)]).double()
            part = Moments(bordered_gram(phi), cross, float(targets.double().square().sum()), len(phi))
            total = part if total is None else total + part
        assert total is not None  # Features refuses an empty stream
        return total

    def __add__(self, other: "Moments") -> "Moments":
        if self.cross.shape != other.cross.shape:
            raise complaint(
                f"moments of shape {tuple(self.cross.shape)} and {tuple(other.cross.shape)}",
                "equal widths and outputs",
                "Take all moments with the same backbone and number of outputs.",
            )
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.target_square + other.target_square,
            self.rows + other.rows,
        )


def gram(phi: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """`phi^T phi` in float64: products in the type of `phi`, only the blocks on and above the diagonal.

    Cost: (1 + 1 / PANELS) n d^2 flops instead of 2 n d^2.
    """
    width = phi.shape[1]
    result = phi.new_empty(width, width)
    edges = torch.linspace(0, width, PANELS + 1).long().tolist() if width >= 128 else [0, width]
    for start, stop in pairwise(edges):
        panel = phi[:, start:stop].T @ phi[:, start:]
        result[start:stop, start:] = panel
        result[stop:, start:stop] = panel[:, stop - start :].T
    return result.double()


def bordered_gram(phi: Float[Tensor, "n d"]) -> Float[Tensor, "d_bias d_bias"]:
    """The Gram of `phi` extended by a constant 1, without copying `phi`."""
    width = phi.shape[1]
    result = torch.empty(width + 1, width + 1, dtype=torch.float64, device=phi.device)
    result[:width, :width] = gram(phi)
    result[width, :width] = result[:width, width] = phi.sum(0).double()
    result[width, width] = len(phi)
    return result


def stacked_gram(phi: Float[Tensor, "n d"], stacked_rows: int) -> Float[Tensor, "rows rows"]:
    """The Gram of `phi`, with the bias border where the stacked head has `stacked_rows` = d + 1 rows."""
    return gram(phi) if phi.shape[1] == stacked_rows else bordered_gram(phi)


def streamed_gram(features: Features, stacked_rows: int) -> Float[Tensor, "rows rows"]:
    """`phi^T phi` over all blocks, with the bias border where `stacked_rows` = d + 1. Float64."""
    total: Tensor | None = None
    for phi, _ in features.blocks():
        part = stacked_gram(phi, stacked_rows)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
