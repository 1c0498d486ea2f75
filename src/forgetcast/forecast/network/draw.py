"""Which new samples an anchor takes: the hard ones more often, every class in its share, few twice."""

from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = (sqrt(5) - 1) / 2
UNIFORM_SHARE = 0.3


@dataclass(frozen=True, eq=False)
class Draw:
    r"""Systematic sampling with unequal probabilities.

        p_i = (1 - u) s_i / sum s + u / n,        weight of a sample drawn c_i times:  c_i / (n p_i)

    The samples lie side by side, class after class, each as long as p_i; anchor k takes those under equally spaced
    marks that start at the golden-ratio share of a space later than the marks of anchor k - 1, so that classes keep
    their shares and anchors hardly repeat each other.

    Attributes:
        order: (n,) places of the samples, class after class, shuffled within.
        probability: (n,) p_i, in this order.
    """

    order: Int[Tensor, " n"]
    probability: Float[Tensor, " n"]

    def anchor(self, index: int, count: int) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
        """Places and weights (which sum to 1) of the at most `count` samples of one anchor."""
        start = (0.5 + index * GOLDEN) % 1.0
        marks = (torch.arange(count, dtype=torch.float64) + start) / count
        hits = torch.searchsorted(self.probability.cumsum(0), marks).clamp_max(len(self.order) - 1)
        found, times = torch.unique(hits, return_counts=True)
        weights = times / self.probability[found]
        return self.order[found], weights / weights.sum()


def draw(targets: Tensor | None, count: int, scores: Float[Tensor, " n"] | None, seed: int) -> Draw:
    """Prepare the drawing.

    Args:
        targets: (count, ...) of the new samples; labels keep classes together.
        count: n.
        scores: sizes of the samples' gradients now; None draws all alike.
        seed: of the order within a class.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if targets is not None and targets.ndim == 1:
        order = order[torch.argsort(targets.cpu()[order], stable=True)]
    probability = torch.full((count,), 1.0 / count, dtype=torch.float64)
    if scores is not None and float(scores.sum()) > 0:
        sizes = scores.detach().cpu().double()
        probability = ((1 - UNIFORM_SHARE) * sizes / sizes.sum() + UNIFORM_SHARE / count)[order]
    return Draw(order, probability / probability.sum())
