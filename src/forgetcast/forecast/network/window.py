"""The last few anchors as one set of samples: what they say about the gradient of the loss anywhere on the path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.forecast.network.surrogate import TINY, Slope, Surrogate

STALENESS = 2.0
"""How much faster gradients go stale than the features' motion; set on two transitions (docs/forecast_results.md)."""
MOST_ROWS = 64
"""Samples of anchors in use together, at most: 8 anchors of 8. Where a budget pays for anchors of 22, 8 of them lag
behind the path: at 40 % on five transitions of a ViT with placed heads cosine and rank were 0.75 and 0.65; with two
anchors in use they are 0.80 and 0.71."""


@dataclass(frozen=True, eq=False)
class Window:
    """Samples of several anchors, each seen from its own; their gradients are neither moved nor copied.

    Attributes:
        parts: the anchors.
        directions: (n, d) of all samples.
        weights: (n,) of all samples; they sum to 1, and an anchor counts as much as it has samples.
        lengths: (n,) ||g_i||^2.
        shift: (n, C) by which the run's own steps on the samples have moved their logits (`memory`), or None.
        error: gradient of each sample's loss at its logits.
        effective: how many samples of equal weight would give as sharp a mean.
    """

    parts: tuple[Surrogate, ...]
    directions: Float[Tensor, "n d"]
    weights: Float[Tensor, " n"]
    lengths: Float[Tensor, " n"]
    shift: Float[Tensor, "n C"] | None
    error: Callable[[Tensor], Tensor]
    effective: float

    def body(
        self,
        features: Float[Tensor, "n d"],
        weight: Float[Tensor, "C d"],
        bias: Float[Tensor, " C"],
        profile: Float[Tensor, " P"] | None,
    ) -> tuple[Slope, float, float]:
        r"""Slope of theta; the share of the gradient at the features that lies outside the directions kept; and n.

        How many samples of equal weight would give as sharp a mean of gradients w_i a_i g_i that are not all of a size,

            n = sum_i w_i e_i / sum_i w_i^2 e_i,        e_i = a_i^2 ||g_i||^2

        Samples that are drawn because their gradients are large carry small weights: n is several times 1 / sum w^2.

        Args:
            features: of all samples now, as `moved` gives them.
            weight: of the head.
            bias: of the head.
            profile: how the mean square of the gradients in theta is spread over theta (`profile`); None where the
                gradient is the run's own and its spread does not matter.

        Cost: 2 n P.
        """
        _, pull, along = self.pulls(features, weight, bias)
        total = float(pull.square().sum())
        blind = 1 - float(along.square().sum()) / total if total > TINY else 0.0
        mean = _mixed(along * self.weights, [part.gradients for part in self.parts])
        energy = (self.weights * along.square()).sum()
        squares = self.weights * along.square() * self.lengths
        scatter = float((self.weights * squares).sum())
        sharp = float(squares.sum()) / scatter if scatter > TINY else self.effective
        return Slope(mean, mean.square() if profile is None else profile * energy), blind, sharp

    def head(
        self,
        features: Float[Tensor, "n d"],
        weight: Float[Tensor, "C d"],
        bias: Float[Tensor, " C"],
    ) -> tuple[Slope, Slope]:
        """Slopes of W and b, over the anchors' samples alone; arguments as of `body`."""
        error = self.pulls(features, weight, bias)[0]
        weighted = error * self.weights[:, None]
        rows = Slope(weighted.T @ features, (weighted * error).T @ features.square())
        return rows, Slope(weighted.sum(0), (weighted * error).sum(0))

    def pulls(
        self, features: Float[Tensor, "n d"], weight: Float[Tensor, "C d"], bias: Float[Tensor, " C"]
    ) -> tuple[Float[Tensor, "n C"], Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Gradients of each sample's loss at its logits and at its features; and along its direction."""
        logits = features @ weight.T + bias
        error = self.error(logits if self.shift is None else logits + self.shift)
        pull = error @ weight
        return error, pull, (self.directions * pull).sum(1)

    def moved(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "n d"]:
        """Features of all samples at theta. Cost: 2 n P."""
        return torch.cat([part.moved(theta) for part in self.parts])

    @property
    def places(self) -> Tensor:
        """(n,) of the samples among those that anchors draw from."""
        return torch.cat([part.places for part in self.parts])

    def then(self, newest: Surrogate, shift: Float[Tensor, "_ C"] | None, most: int) -> "Window":
        """With one anchor more, and of all of them the last `most`."""
        parts = (*self.parts, newest)[-most:]
        if self.shift is not None and shift is not None:
            shift = torch.cat([self.shift, shift])[-sum(len(part) for part in parts) :]
        return _window(parts, shift)


def window(first: Surrogate, shift: Float[Tensor, "n C"] | None) -> Window:
    """Of one anchor."""
    return _window((first,), shift)


def profile(
    weights: Float[Tensor, " n"], along: Float[Tensor, " n"], squares: Float[Tensor, "n P"]
) -> Float[Tensor, " P"]:
    r"""How the mean square of the gradients of an anchor's samples is spread over theta.

        sum_i w_i a_i^2 g_i^2 / sum_i w_i a_i^2

    It changes less along a path than the errors a_i do: many anchors know it better than the few in use.

    Args:
        weights: w_i of the samples.
        along: a_i, gradient of each sample's loss along its direction.
        squares: g_i^2.

    Cost: 2 n P.
    """
    energies = weights * along.square()
    total = float(energies.sum())
    found: Tensor = squares.T @ (energies / total if total > TINY else weights)
    return found


def anchors_in_use(noise: float, staleness: float, samples: float, least: int, most: int) -> int:
    r"""How many anchors together give the sharpest gradient.

    Of k anchors the noise is rho^2 / (n k) of the squared gradient, and what has changed since they were taken is about
    (k c epsilon)^2; the sum is least at

        k^3 = rho^2 / (2 n c^2 epsilon^2)

    Args:
        noise: rho^2, spread of the samples' gradients relative to their squared mean.
        staleness: epsilon, `||predicted - actual|| / ||actual||` of the features' motion from one anchor to the next.
        samples: n, of an anchor.
        least: k at least.
        most: k at most, unless `least` is more.
    """
    k = (noise / (2 * samples * (STALENESS * max(staleness, 1e-6)) ** 2)) ** (1 / 3)
    return max(least, min(int(k), most))


def _window(parts: tuple[Surrogate, ...], shift: Tensor | None) -> Window:
    sizes = [part.effective for part in parts]
    weights = torch.cat([part.weights * (size / sum(sizes)) for part, size in zip(parts, sizes, strict=True)])
    objective = replace(parts[-1].objective, targets=torch.cat([part.objective.targets for part in parts]))
    directions = torch.cat([part.directions for part in parts])
    lengths = torch.cat([part.lengths for part in parts])
    effective = 1 / float(weights.square().sum())
    return Window(parts, directions, weights, lengths, shift, objective.errors(weights), effective)


def _mixed(share: Float[Tensor, " n"], rows: Sequence[Float[Tensor, "_ P"]]) -> Float[Tensor, " P"]:
    """`sum_i share_i row_i` over matrices below each other."""
    result = rows[0].new_zeros(rows[0].shape[1])
    for part, matrix in zip(torch.split(share, [len(matrix) for matrix in rows]), rows, strict=True):
        result.addmv_(matrix.T, part)
    return result
