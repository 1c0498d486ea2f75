"""The head's own training: on the features of many samples at one step, moved as the anchors' samples move."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch
from jaxtyping import Float, Int
from torch import Tensor

from forgetcast.forecast.network.surrogate import Objective, Slope
from forgetcast.forecast.network.window import Window

TURN = 128
"""Samples a step of a stock that is not whole, at most, in turns: momentum averages them, and what-ifs do not wait."""


@dataclass(frozen=True, eq=False)
class Turn:
    """Samples that take part in a step.

    Attributes:
        taken: (b,) of them.
        error: gradient of each one's loss at its logits.
    """

    taken: Int[Tensor, " b"]
    error: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.taken)


@dataclass(frozen=True, eq=False)
class Stock:
    """Features of new samples at the start.

    A head needs no gradient of the body: with features at hand all samples can take part in its training. What the body
    adds on the way is told by the samples of the anchors, class by class,

        phi_i(theta) ~ phi_i(theta_0) + mean over anchor samples j of the class of i of  phi_j(theta) - phi_j(theta_0)

    Attributes:
        features: (m, d) at theta_0.
        objective: their loss.
        groups: (m,) class of each sample, from 0; 0 for all without labels.
        whole: whether these are all samples of the run, in its order: then the head sees the run's own batches.
    """

    features: Float[Tensor, "m d"]
    objective: Objective
    groups: Int[Tensor, " m"]
    whole: bool

    @cached_property
    def classes(self) -> int:
        """G."""
        return int(self.groups.max()) + 1

    def slopes(
        self,
        near: Window,
        moved: Float[Tensor, "n d"],
        weight: Float[Tensor, "C d"],
        bias: Float[Tensor, " C"],
        turn: Turn,
    ) -> tuple[Slope, Slope]:
        """Of W and b over some of the samples.

        Args:
            near: the anchors in use.
            moved: features of their samples now.
            weight: of the head.
            bias: of the head.
            turn: the samples that take part.

        Cost: 3 b d C.
        """
        features = self.features[turn.taken] + self.shifts(near, moved)[self.groups[turn.taken]]
        error = turn.error(features @ weight.T + bias)
        weighted = error / len(error)
        second = weighted * error
        return (
            Slope(weighted.T @ features, second.T @ features.square()),
            Slope(weighted.sum(0), second.sum(0)),
        )

    def turn(self, taken: Int[Tensor, " b"]) -> Turn:
        """Some of the samples, made ready."""
        return Turn(taken, self.objective.at(taken).errors(self.features))

    def turns(self, half: int | None = None) -> tuple[Turn, ...]:
        """Which samples take part at each step, over and over: of all or of every other, at most about TURN at once."""
        first, stride = (0, 1) if half is None else (half, 2)
        kept = torch.arange(first, len(self.features), stride, device=self.features.device)
        number = ceil(len(kept) / TURN)
        return tuple(self.turn(kept[k::number]) for k in range(number))

    def shifts(self, near: Window, moved: Float[Tensor, "n d"]) -> Float[Tensor, "G d"]:
        """Mean motion of the features of each class; of all samples, where an anchor holds none of it."""
        motion = (moved - self.features[near.places]) * near.weights[:, None]
        groups = self.groups[near.places]
        sums = motion.new_zeros(self.classes, motion.shape[1]).index_add_(0, groups, motion)
        shares = near.weights.new_zeros(self.classes).index_add_(0, groups, near.weights)
        return torch.where(shares[:, None] > 0, sums / shares.clamp_min(1e-12)[:, None], motion.sum(0))


def stock(features: Float[Tensor, "m d"], objective: Objective, whole: bool) -> Stock:
    """Of samples whose features have been read."""
    targets = objective.targets.to(features.device)
    if targets.ndim == 1 and not targets.is_floating_point():
        groups = torch.unique(targets, return_inverse=True)[1]
    else:
        groups = torch.zeros(len(targets), dtype=torch.int64, device=features.device)
    return Stock(features, objective, groups, whole)
