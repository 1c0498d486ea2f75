r"""A network near an anchor: features that move along one direction a sample, under a head that is exact.

At an anchor theta_k with features phi_i, let v_i be the unit direction along which the loss pulls at the features of
sample i, and g_i = d (v_i . phi_i) / d theta, one backward pass for all. Then

    phi_i(theta) ~ phi_i + v_i  g_i . (theta - theta_k),        logits = W phi_i(theta) + b

The Jacobian of the features is kept where the loss looks, the head stays exact, and so does its product with the
features' motion: a fresh head whose rows are equal has no tangent in theta, and needs this second-order term. Gradients
of any loss follow by the chain rule; `blind` says which share of them falls outside the directions kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.simulate import loss_error
from forgetcast.forecast.training import Training
from forgetcast.tangent.passes import Work
from forgetcast.tangent.planner import chunk_size

Error = Callable[[Tensor, Tensor | None], Tensor]
Sight = Callable[[Tensor, "Objective"], tuple[Tensor, Tensor]]
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a training, sample by sample.

    Attributes:
        training: with the loss, its reduction and the outputs it sees.
        targets: (n,) labels or (n, C) values of the samples at hand.
        outputs: C.
    """

    training: Training
    targets: Tensor
    outputs: int

    def at(self, chosen: Tensor) -> "Objective":
        """Of some of the samples."""
        return replace(self, targets=self.targets[chosen.to(self.targets.device)])

    def errors(self, like: Tensor) -> Callable[[Float[Tensor, "n C"]], Float[Tensor, "n C"]]:
        """`error`, made ready once for many logits of the type and device of `like`."""
        columns, error = loss_error(self.training, self.targets, self.outputs, like)

        def of(logits: Tensor) -> Tensor:  # plain: a jaxtyping annotation costs more here than the softmax
            scale = len(logits) if self.training.reduction == "mean" else 1
            if columns is None:
                return error(logits.clone(), None).mul_(scale)
            whole = torch.zeros_like(logits)
            whole[:, columns] = error(logits[:, columns], None) * scale
            return whole

        return of

    def error(self, logits: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        """Gradient d loss_i / d logits_i of each sample on its own, without the average over a batch."""
        return self.errors(logits)(logits)

    def pull(self, logits: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        """A direction in the outputs along which each sample's loss falls, of a size that does not vanish with it.

        For labels under cross-entropy the gradient of the margin log p_y - log(1 - p_y): e_y minus the softmax of the
        other outputs. Otherwise the error, reversed.
        """
        if self.training.loss != "cross_entropy" or self.targets.ndim != 1:
            return -self.error(logits)
        columns = torch.arange(self.outputs) if self.training.classes is None else torch.tensor(self.training.classes)
        masked = torch.full_like(logits, -torch.inf)
        masked[:, columns.to(logits.device)] = logits[:, columns.to(logits.device)]
        own = self.targets.to(logits.device).long()[:, None]
        others = masked.scatter(1, own, -torch.inf)
        if len(columns) == 1:
            return torch.zeros_like(logits)
        return torch.zeros_like(logits).scatter(1, own, 1.0) - torch.softmax(others, 1)


@dataclass(frozen=True, eq=False)
class Slope:
    """Mean gradient over samples, and the mean of their squares, for each parameter.

    Attributes:
        mean: (P,) sum_i w_i g_i.
        second: (P,) sum_i w_i g_i^2.
    """

    mean: Tensor
    second: Tensor


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Some new samples, each at its anchor.

    Attributes:
        features: (n, d) phi_i at the anchor.
        directions: (n, d) unit v_i, or zero.
        gradients: (n, P) g_i.
        offsets: (n,) g_i . theta_k.
        objective: their loss.
        weights: (n,) of each sample in the mean over all new samples; they sum to 1.
        step: of the anchor.
        unread: (n,) whether the path had not read the sample before.
        places: (n,) of the samples among those that anchors draw from.
    """

    features: Float[Tensor, "n d"]
    directions: Float[Tensor, "n d"]
    gradients: Float[Tensor, "n P"]
    offsets: Float[Tensor, " n"]
    objective: Objective
    weights: Float[Tensor, " n"]
    step: int
    unread: Bool[Tensor, " n"]
    places: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def lengths(self) -> Float[Tensor, " n"]:
        """||g_i||^2."""
        return self.gradients.square().sum(1)

    @property
    def effective(self) -> float:
        """How many samples of equal weight would give as sharp a mean: 1 / sum w^2."""
        return 1.0 / float(self.weights.square().sum())

    def moved(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "n d"]:
        """Features at theta. Cost: 2 n P."""
        return self.features + self.directions * (self.gradients @ theta - self.offsets)[:, None]

    def part(self, chosen: Tensor) -> "Surrogate":
        """Some of its samples, as if no others had been taken."""
        weights = self.weights[chosen]
        return replace(
            self,
            features=self.features[chosen],
            directions=self.directions[chosen],
            gradients=self.gradients[chosen],
            offsets=self.offsets[chosen],
            objective=replace(self.objective, targets=self.objective.targets[chosen.to(self.objective.targets.device)]),
            weights=weights / weights.sum(),
            unread=self.unread[chosen],
            places=self.places[chosen],
        )


def surrogate(
    net: Network,
    work: Work | None,
    samples: Samples,
    training: Training,
    weights: Float[Tensor, " n"],
    step: int,
    sight: Sight | None = None,
    unread: Bool[Tensor, " n"] | None = None,
    places: Int[Tensor, " n"] | None = None,
) -> Surrogate:
    """Take the features, directions and gradients of samples at the model's present parameters.

    Args:
        net: the model.
        work: its survey (`prepared`), or None where no parameter outside the head trains.
        samples: the samples.
        training: with the loss.
        weights: of the samples.
        step: how many steps the training has made.
        sight: gives another head (W, b) to take the directions from, for the features of the first samples that go
            through the model together; the present head by default.
        unread: whether the path had not read the sample before; all by default.
        places: of the samples among those that anchors draw from; their own order by default.

    Raises:
        ValueError: features or logits that are not finite.

    Cost: one pass forward, one backward.
    """
    head = net.weight(), net.bias()
    unread = torch.ones(len(samples), dtype=torch.bool, device=head[0].device) if unread is None else unread
    assert samples.targets is not None
    objective = Objective(training, samples.targets, net.outputs)
    taken = torch.arange(len(samples), device=head[0].device) if places is None else places
    if work is None:
        features = net.features(samples)
        empty = features.new_zeros(len(features), 0)
        return Surrogate(
            features, torch.zeros_like(features), empty, empty.sum(1), objective, weights, step, unread, taken
        )
    like = net.weight()
    features = like.new_zeros(len(samples), net.width)
    directions = torch.zeros_like(features)

    with net.tapped() as kept:

        def heads(found: Any, places: slice) -> Tensor:
            nonlocal head
            phi = net.features_of(found, kept)
            part = Objective(training, objective.targets[places], net.outputs)
            if sight is not None and places.start == 0:
                head = sight(phi.detach(), part)
            pull = directed(phi.detach(), part, *head)
            if step > 0 and not bool((phi.detach().isfinite() & pull.isfinite()).all()):
                raise complaint(
                    f"a predicted training that diverges: features or logits that are not finite after {step} steps",
                    "one that stays finite",
                    "Lower the learning rate.",
                )
            features[places], directions[places] = phi.detach(), pull
            return (phi * pull).sum(1, keepdim=True)

        chunk = chunk_size(work.survey.sample_bytes, len(samples))
        rows, _ = replace(work, inputs=samples.inputs, heads=heads, chunk=chunk).explicit(None)
    gradients = rows[:, 0]
    return Surrogate(features, directions, gradients, gradients @ net.theta(), objective, weights, step, unread, taken)


def directed(
    phi: Float[Tensor, "n d"], objective: Objective, weight: Float[Tensor, "C d"], bias: Float[Tensor, " C"]
) -> Float[Tensor, "n d"]:
    """Unit directions at the features along which the loss falls; zero where the head is blind to all."""
    pull = objective.pull(phi @ weight.T + bias) @ weight
    norm = pull.norm(dim=1, keepdim=True)
    return torch.where(norm > TINY, pull / norm.clamp_min(TINY), 0.0)
