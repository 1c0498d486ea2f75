"""Samples whose answers are read again and again: which are right, and by what margin."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.forecast.network.samples import Samples


def smoothed(margins: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    r"""How much each answer counts as right: its part of a kernel density estimate of the margins that is above 0.

        Phi(m_i / h),     h = 1.06 std(m) n^(-1/3)

    A sample near the boundary counts as part right and part wrong. Of two models that answer alike but for a few
    samples the mean tells the better one from fewer samples than counting does; the rate n^(-1/3) is that of the least
    squared error of an estimated distribution function.

    Args:
        margins: (n,) logit of the label minus the largest other; infinite where there is no other.

    Source: Azzalini 1981, Biometrika 68.
    """
    margins = margins.double()
    finite = margins[torch.isfinite(margins)]
    width = 1.06 * float(finite.std(correction=0)) * len(margins) ** (-1 / 3) if len(finite) > 1 else 0.0
    return torch.special.ndtr(margins / width) if width > 0 else (margins > 0).double()


def smoothed_accuracy(margins: Float[Tensor, " n"]) -> float:
    """Mean of `smoothed`: an accuracy in which answers near the boundary count as part right."""
    return float(smoothed(margins).mean())


@dataclass(frozen=True, eq=False)
class Answers:
    """Of some samples.

    Attributes:
        right: whether each is the label, 0 or 1.
        margins: logit of the label minus the largest other possible answer.
    """

    right: Float[Tensor, " n"]
    margins: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.right)

    def first(self, count: int) -> "Answers":
        """The first so many."""
        return Answers(self.right[:count], self.margins[:count])

    def then(self, more: "Answers") -> "Answers":
        """These and more."""
        return Answers(torch.cat([self.right, more.right]), torch.cat([self.margins, more.margins]))


@dataclass(frozen=True, eq=False)
class Probe:
    """Samples whose accuracy is read.

    Attributes:
        samples: with their labels.
        labels: (n,)
        features: (n, d) at the start.
        allowed: (n, C), among which outputs an answer is chosen.
    """

    samples: Samples
    labels: Int[Tensor, " n"]
    features: Float[Tensor, "n d"]
    allowed: Bool[Tensor, "n C"]

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, places: Int[Tensor, " m"]) -> "Probe":
        """Some of the samples, in that order."""
        there = places.to(self.features.device)
        return Probe(self.samples.at(places), self.labels[places], self.features[there], self.allowed[places])

    def part(self, first: int, end: int) -> "Probe":
        """The samples from one place to before another."""
        return self.at(torch.arange(first, end))

    def answers(self, logits: Float[Tensor, "n C"]) -> Answers:
        """What logits say of all samples."""
        possible, labels = self._possible(logits), self.labels.to(logits.device)[:, None]
        right = (possible.argmax(1) == labels[:, 0]).double()
        own = possible.gather(1, labels)[:, 0]
        return Answers(right, own - possible.scatter(1, labels, -torch.inf).amax(1))

    def _possible(self, logits: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        return logits.masked_fill(~self.allowed.to(logits.device), -torch.inf)


def allowed_answers(name: str, given: Tensor | None, labels: Tensor, outputs: int) -> Bool[Tensor, "n C"]:
    """Among which outputs each answer is chosen; every label has to be one of them.

    Raises:
        ValueError: what are no booleans of that shape; a label that is not allowed.
    """
    if given is None:
        return torch.ones(len(labels), outputs, dtype=torch.bool)
    allowed = torch.as_tensor(given).cpu()
    fits = allowed.ndim == 2 and allowed.dtype == torch.bool and len(allowed) in (1, len(labels))
    if not fits or allowed.shape[1] != outputs:
        raise complaint(
            f"{name} of shape {tuple(allowed.shape)}, {allowed.dtype}",
            f"booleans of shape ({len(labels)}, {outputs}) or (1, {outputs})",
            "Give one row for each sample, or one for all, with one column for each output.",
        )
    allowed = allowed.expand(len(labels), -1)
    missing = (~allowed[torch.arange(len(labels)), labels.cpu()]).nonzero()
    if len(missing):
        raise complaint(
            f"{name} without the label of {len(missing)} samples, the first at {int(missing[0])}",
            "answers that can be right",
            "Allow each sample's own label.",
        )
    return allowed


def balanced_order(labels: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"]:
    """An order in which every beginning holds each label in about its share; random within a label."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    own = labels.cpu()[shuffled]
    grouped = torch.argsort(own, stable=True)
    counts = torch.unique_consecutive(own[grouped], return_counts=True)[1]
    rank = torch.cat([(torch.arange(int(count)) + 0.5) / int(count) for count in counts])
    return shuffled[grouped[torch.argsort(rank, stable=True)]]
