"""The head's own training: on the features of many samples at the start, moved as the anchors' samples move."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from forgetcast.forecast.network.surrogate import Objective, Slope
from forgetcast.forecast.network.window import Window


@dataclass(frozen=True, eq=False)
class Stock:
    """Features of new samples at the start.

    A head needs no gradient of the body: with features at hand all samples can take part in its training. What the body
    adds on the way is told by the samples of the anchors, class by class,

        phi_i(theta) ~ phi_i(theta_0) + mean over anchor samples j of the class of i of  phi_j(theta) - phi_j(theta_0)

    Attributes:
        features: (m, d) at the start.
        objective: their loss.
        groups: (m,) class of each sample, from 0; 0 for all without labels.
        whole: whether these are all samples of the run, in its order: then the head sees the run's own batches.
    """

    features: Float[Tensor, "m d"]
    objective: Objective
    groups: Int[Tensor, " m"]
    whole: bool

    def slopes(
        self,
        near: Window,
        moved: Float[Tensor, "n d"],
        weight: Float[Tensor, "C d"],
        bias: Float[Tensor, " C"],
        taken: Int[Tensor, " b"],
        factors: Float[Tensor, " b"] | None = None,
    ) -> tuple[Slope, Slope]:
        """Of W and b over some of the samples.

        Args:
            near: the anchors in use.
            moved: features of their samples now.
            weight: of the head.
            bias: of the head.
            taken: a batch, or all.
            factors: of the samples' weights, about 1.

        Cost: 3 b d C.
        """
        features = self.features[taken] + self.shifts(near, moved)[self.groups[taken]]
        error = self.objective.at(taken).error(features @ weight.T + bias)
        weighted = (error if factors is None else error * factors[:, None]) / len(error)
        second = weighted * error
        return (
            Slope(weighted.T @ features, second.T @ features.square()),
            Slope(weighted.sum(0), second.sum(0)),
        )

    def shifts(self, near: Window, moved: Float[Tensor, "n d"]) -> Float[Tensor, "G d"]:
        """Mean motion of the features of each class; of all samples, where an anchor holds none of it."""
        motion = (moved - self.features[near.places]) * near.weights[:, None]
        groups = self.groups[near.places]
        count = int(self.groups.max()) + 1
        sums = motion.new_zeros(count, motion.shape[1]).index_add_(0, groups, motion)
        shares = near.weights.new_zeros(count).index_add_(0, groups, near.weights)
        return torch.where(shares[:, None] > 0, sums / shares.clamp_min(1e-12)[:, None], motion.sum(0))


def stock(features: Float[Tensor, "m d"], objective: Objective, whole: bool) -> Stock:
    """Of samples whose features have been read at the start."""
    targets = objective.targets.to(features.device)
    if targets.ndim == 1 and not targets.is_floating_point():
        groups = torch.unique(targets, return_inverse=True)[1]
    else:
        groups = torch.zeros(len(targets), dtype=torch.int64, device=features.device)
    return Stock(features, objective, groups, whole)
