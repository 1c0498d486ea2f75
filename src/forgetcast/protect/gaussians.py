r"""Classes as Gaussians of their features: measured, moved, drawn from, and a head trained again on what is drawn.

    measure  mu_c, Sigma_c    mean of the features of class c, and their covariance + jitter 1
    shift    mu_c <- mu_c + sum_i w_i (phi'_i - phi_i) / sum_i w_i,    w_i = exp(-|phi_i - mu_c|^2 / 2 sigma^2) + floor
    align    min_head E_c E_{phi ~ N(mu_c, Sigma_c)} loss(head(phi), c)

phi and phi' are features of the same new samples, before and after a training: old classes are moved by what became of
the new samples near them. No sample is kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from forgetcast.checks import complaint, require_finite, require_integer, require_number

JITTER = 1e-4
"""Added to the diagonal of a covariance, so that fewer samples than features still give a Cholesky factor."""


class Gaussians:
    """Mean and covariance of each class, and what is drawn of them.

    Args:
        jitter: of the covariances.
        seed: of what is drawn.

    Attributes:
        classes: "mean" (d,) and "root" (d, d), the Cholesky factor of the covariance, of each class; float64.

    Cost: d^2 numbers a class for ever.
    """

    def __init__(self, seed: int = 0, *, jitter: float = JITTER) -> None:
        require_number("jitter", jitter, strict=True)
        self.jitter = jitter
        self.generator = torch.Generator().manual_seed(seed)
        self.classes: dict[int, dict[str, Tensor]] = {}

    def measure(self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Take in classes; one that is there already is measured anew. Cost: n d^2, and d^3 a class."""
        for label in sorted(set(labels.tolist())):
            phi = features[labels == label].double()
            mean = phi.mean(0)
            centred = phi - mean
            covariance = centred.T @ centred / max(len(phi) - 1, 1)
            covariance.diagonal().add_(self.jitter)
            self.classes[label] = {"mean": mean, "root": torch.linalg.cholesky(covariance)}

    def shift(
        self, before: Float[Tensor, "n d"], after: Float[Tensor, "m d"], bandwidth: float, floor: float = 0.0
    ) -> None:
        """Move the mean of every class by `shifts`; covariances stay. Arguments and errors as there."""
        means = torch.stack([values["mean"] for values in self.classes.values()]).to(before.device)
        moved = means + shifts(means, before, after, bandwidth, floor)
        for values, mean in zip(self.classes.values(), moved, strict=True):
            values["mean"] = mean.clone()

    def draw(self, count: int, like: Tensor) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """`count` features of each class with their labels, class by class, of the type and device of `like`."""
        parts, labels = [], []
        for label, values in self.classes.items():
            mean, root = values["mean"].to(like), values["root"].to(like)
            noise = torch.randn(count, len(mean), generator=self.generator).to(like)
            parts.append(mean + noise @ root.T)
            labels += [label] * count
        return torch.cat(parts), torch.tensor(labels, device=like.device)

    def state_dict(self) -> dict[str, Any]:
        """Means, roots and the generator."""
        statistics = {str(label): dict(values) for label, values in self.classes.items()}
        return {"statistics": statistics, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.classes = {int(label): dict(values) for label, values in state["statistics"].items()}
        self.generator.set_state(state["generator"].cpu())


def shifts(
    means: Float[Tensor, "C d"],
    before: Float[Tensor, "n d"],
    after: Float[Tensor, "m d"],
    bandwidth: float,
    floor: float = 0.0,
) -> Float[Tensor, "C d"]:
    """How far each mean is taken to have moved: the mean move of the samples, those near it counting most.

    The weights are normalised as logarithms: also where all samples are far away they are no 0 / 0.

    Args:
        means: of classes.
        before: features of some samples before a training, all d of them finite.
        after: of the same samples after it, in the same order.
        bandwidth: sigma.
        floor: added to each weight; far from all samples a mean then moves as they do on average, and without it as
            the nearest does.

    Raises:
        ValueError: other samples after than before, none, or features that are not finite.

    Cost: C n d flops, C n numbers.

    Source: Yu et al., CVPR 2020 (arXiv 2004.00440), semantic drift compensation.
    """
    require_number("bandwidth", bandwidth, strict=True)
    require_number("floor", floor)
    if before.shape != after.shape or not len(before):
        raise complaint(
            f"features {tuple(before.shape)} before and {tuple(after.shape)} after",
            "those of the same samples, at least one",
            "Read the same samples in the same order both times.",
        )
    require_finite("features before", before)
    require_finite("features after", after)
    phi, means = before.double(), means.double()
    near = -torch.cdist(means, phi).square() / (2 * bandwidth**2)
    weights = torch.logaddexp(near, near.new_tensor(floor).log()).softmax(1)
    return weights @ (after.double() - phi)


def section_shifts(
    means: Float[Tensor, "C D"],
    before: Float[Tensor, "n D"],
    after: Float[Tensor, "m D"],
    sections: int,
    bandwidth: float = 1.0,
) -> Float[Tensor, "C D"]:
    """`shifts` of each section of the features by itself, at a bandwidth in units of its own distances.

    Args:
        means: of classes.
        before: features of some samples before a training, D = sections times d wide.
        after: of the same samples after it, in the same order.
        sections: how many lie side by side.
        bandwidth: sigma of a section over the median distance there between a mean and a sample. Where the samples
            are far from all means, as in d = 192 dimensions, all count nearly alike at 1.

    Returns:
        (C, D) float64, in the units of the features: a section in other units moves in these.

    Raises:
        ValueError: as `shifts`.

    Cost: twice the C n D flops of `shifts`, C n numbers.

    Source: as `shifts`; by section and in units of its distances: ours.
    """
    require_number("bandwidth", bandwidth, strict=True)
    found = []
    for mean, was, now in zip(*(part.chunk(sections, 1) for part in (means, before, after)), strict=True):
        distance = torch.cdist(mean.double(), was.double()).median().item() if len(was) and len(mean) else 0.0
        found.append(shifts(mean, was, now, bandwidth * distance or 1.0))
    return torch.cat(found, 1)


@dataclass(frozen=True)
class Alignment:
    """How a head is trained on drawn features: SGD with momentum 0.9 and weight decay 5e-4, a cosine over the epochs.

    Attributes:
        rate: learning rate.
        epochs: each of features drawn anew.
        samples: features drawn a class and epoch, and features a step.

    Source: arXiv 2303.05118, section 3, with the settings of its code.
    """

    rate: float
    epochs: int = 5
    samples: int = 256

    def __post_init__(self) -> None:
        require_number("rate", self.rate)
        require_integer("epochs", self.epochs)
        require_integer("samples", self.samples, least=1)

    def align(self, head: nn.Module, gaussians: Gaussians, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Train what trains of a head.

        Args:
            head: features (n, d) to logits (n, C).
            gaussians: of the classes.
            loss: of logits and labels.

        Cost: epochs x samples x classes features through the head, forward and backward.
        """
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=self.rate, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(self.epochs, 1))
        for _ in range(self.epochs):
            features, labels = gaussians.draw(self.samples, parameters[0])
            order = torch.randperm(len(labels), generator=gaussians.generator).to(labels.device)
            for rows in torch.split(order, self.samples):
                optimizer.zero_grad()
                loss(head(features[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            schedule.step()
        optimizer.zero_grad()
