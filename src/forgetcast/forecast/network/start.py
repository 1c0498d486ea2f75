"""The head at the start of a training: whether it tells the new labels apart, and its new rows placed."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_finite
from forgetcast.forecast.network.given import Given
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.placed import place_rows
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.surrogate import Objective
from forgetcast.forecast.training import Training

SAME = 1e-6
Head = Literal["as_is", "placed"]


@dataclass(frozen=True, eq=False)
class Start:
    """What is read of a model before any training, whatever of it will train.

    Attributes:
        head: whether its new rows were placed.
        old: features of the old samples.
        new: of the new ones, where placing has read them.
        scores: sizes of the new samples' errors at the placed head.
    """

    head: Head
    old: Float[Tensor, "n d"]
    new: Float[Tensor, "m d"] | None
    scores: Float[Tensor, " m"] | None


def read_start(asked: Given, head: Head) -> Start:
    """Read the start; with `head="placed"` the model's new rows are placed, and stay so: whoever calls restores them.

    Raises:
        ValueError: a model without a head to place; old logits that are not finite.

    Cost: one pass over the old samples; with head="placed" one over the new ones.
    """
    net = asked.net
    phi = scores = None
    if head == "placed":
        phi, scores = placed_start(net, asked.old, asked.new, asked.training)
    features = net.features(asked.old.to(net.device))
    require_finite("old logits", features @ net.weight().T + net.bias())
    return Start(head, features, phi, scores)


def degenerate(net: Network, new: Samples, training: Training) -> bool:
    """Whether the head does not tell the new labels apart: their rows are equal, and the body has no tangent there.

    With one new label, the rows of all outputs that the loss sees.
    """
    if net.head is None or not net.body or new.targets is None or new.targets.ndim != 1:
        return False
    named = sorted(set(new.targets.tolist()))
    seen = range(net.outputs) if training.classes is None else training.classes
    rows = net.weight()[named if len(named) > 1 else list(seen)]
    size = float(net.weight().norm(dim=1).max())
    spread = float((rows - rows[0]).norm(dim=1).max())
    return spread <= SAME * max(size, SAME)


def placed_start(net: Network, old: Samples, new: Samples, training: Training) -> tuple[Tensor, Tensor]:
    """Place the new rows; the sizes of the new samples' errors afterwards."""
    if net.head is None or "weight" not in net.of_head:
        raise complaint(
            "head='placed' for a model without a linear head that trains",
            "logits that come straight from an nn.Linear with requires_grad",
            "Leave head='as_is'.",
        )
    targets = new.targets
    if targets is None or targets.ndim != 1 or (old.targets is not None and old.targets.ndim != 1):
        raise complaint("head='placed' with targets that are no labels", "labels (n,)", "Leave head='as_is'.")
    known = set() if old.targets is None else set(old.targets.tolist())
    rows = sorted(set(targets.tolist()) - known)
    phi = net.features(new.to(net.device))
    if len(rows) > 1:
        own = torch.isin(targets, torch.tensor(rows))
        place_rows(net.head, phi[own.to(phi.device)], targets[own].to(phi.device), rows)
    return phi, pulls(net, phi, targets, training)


def pulls(net: Network, phi: Tensor, targets: Tensor, training: Training) -> Tensor:
    """Size of d loss / d phi of each sample at the present head."""
    weight = net.weight()
    error = Objective(training, targets, net.outputs).error(phi @ weight.T + net.bias())
    sizes: Tensor = (error @ weight).norm(dim=1)
    return sizes
