r"""The anchored estimator: the run's expected path through a chain of surrogates.

At each anchor a few new samples are taken at the predicted parameters (one pass forward and backward each); between
anchors the optimiser is followed in feature space at no cost in passes. With the run's own batch as anchor of every
step it is the run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.forecast.network.draw import Draw
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.plan import Budget
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.steps import ExpectedStep
from forgetcast.forecast.network.surrogate import Objective, Surrogate, directed, surrogate
from forgetcast.forecast.simulate import batches
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, Training, clip_factor
from forgetcast.tangent.passes import Work, prepared

SIGHT_STEPS = 3
"""Head-only steps after which the first anchor takes its directions: a fresh head has none at the start."""


@dataclass(frozen=True, eq=False)
class Place:
    """Parameters along a path.

    Attributes:
        theta: (P,) of the body.
        weight: (C, d) of the head.
        bias: (C,).
    """

    theta: Float[Tensor, " P"]
    weight: Float[Tensor, "C d"]
    bias: Float[Tensor, " C"]

    def copy(self) -> "Place":
        """The same numbers elsewhere."""
        return Place(self.theta.clone(), self.weight.clone(), self.bias.clone())


@dataclass(frozen=True, eq=False)
class Path:
    """A predicted path of the parameters.

    Attributes:
        places: after each step asked for.
        surrogates: one an anchor; kept only where they are wanted again.
        blind: for each step, the share of the gradient outside the surrogate's directions.
        misses: for each anchor but the first, squared error and squared size of the change that the one before it
            predicted along the directions of a few samples.
    """

    places: dict[int, Place]
    surrogates: tuple[Surrogate, ...]
    blind: tuple[float, ...]
    misses: tuple[tuple[float, float], ...]

    @property
    def surrogate_error(self) -> float | None:
        """`||predicted - actual|| / ||actual||` of the features' motion along the directions; None without a check."""
        size = sum(actual for _, actual in self.misses)
        return (sum(error for error, _ in self.misses) / size) ** 0.5 if size > 0 else None


@dataclass
class Walker:
    """The optimiser's state along a path."""

    net: Network
    training: SGD | AdamW | GradientDescent
    place: Place
    batch: float
    blind: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        parts = (self.place.theta, self.place.weight, self.place.bias)
        self.states = [ExpectedStep(self.training, part.clone(), self.batch) for part in parts]
        self.near: Surrogate | None = None
        self.squares = self.place.theta

    def step(self, near: Surrogate) -> None:
        """One step on a surrogate."""
        place = self.place
        if near is not self.near:
            self.near, self.squares = near, near.gradients.square()
        body, rows, bias, blind = near.slopes(place.theta, place.weight, place.bias, self.squares)
        self.blind.append(blind)
        moving = [len(place.theta) > 0, "weight" in self.net.of_head, "bias" in self.net.of_head]
        values, slopes = (place.theta, place.weight, place.bias), (body, rows, bias)
        parts = [
            part for part, moves in zip(zip(self.states, values, slopes, strict=True), moving, strict=True) if moves
        ]
        factor = 1.0
        if not isinstance(self.training, GradientDescent) and self.training.max_gradient_norm is not None:
            square = sum(state.expected_square(value, slope, near.effective) for state, value, slope in parts)
            factor = clip_factor(self.training, max(square, 0.0) ** 0.5)
        for state, value, slope in parts:
            state.step(value, slope, near.effective, factor)

    def check(self) -> None:
        """Raise if the path has left the finite numbers."""
        if not all(bool(torch.isfinite(part).all()) for part in (self.place.theta, self.place.weight)):
            raise complaint("a predicted training that diverges", "one that stays finite", "Lower the learning rate.")


@contextmanager
def surveyed(net: Network, new: Samples, training: Training) -> Iterator[Work | None]:
    """The model made ready for gradients of the body; None where nothing but the head trains."""
    if not net.body:
        yield None
        return
    few = new.at(torch.arange(min(2, len(new))))
    assert few.targets is not None
    objective = Objective(training, few.targets, net.outputs)
    weight = net.weight()
    with net.tapped() as kept:

        def heads(found: object, places: slice) -> Tensor:
            phi = net.features_of(found, kept)
            part = replace(objective, targets=objective.targets[places])
            pull = directed(phi.detach(), part, weight, net.bias())
            # a fresh head pulls nowhere; any direction tells how the gradients are to be had
            return (phi * torch.where(pull.any(1, keepdim=True), pull, 1.0)).sum(1, keepdim=True)

        with prepared(net.model, few.inputs, net.body, heads, None) as work:
            yield work


def anchored_path(
    net: Network,
    new: Samples,
    training: SGD | AdamW | GradientDescent,
    plan: Budget,
    drawn: Draw,
    *,
    keep: bool = True,
    on_step: Callable[[int], None] = lambda _: None,
) -> Path:
    """Follow the training along its anchors.

    Args:
        net: the model, at the start of the training; its parameters move and are put back.
        new: all new samples.
        training: minibatches, or full batches.
        plan: where the anchors are, and after which steps the place is wanted.
        drawn: which samples an anchor takes.
        keep: whether the surrogates are kept, for what-ifs.
        on_step: called with the number of each step that is done.

    Raises:
        ValueError: a training that diverges.

    Cost: one pass forward and backward for every anchor sample; 7 n P a step besides.
    """
    batch = batch_of(training, len(new))
    start = Place(net.theta(), net.weight(), net.bias())
    walker = Walker(net, training, start.copy(), batch)
    anchors = dict(plan.anchors)
    order = batches(training, len(new)) if plan.exact and not isinstance(training, GradientDescent) else None
    kept: list[Surrogate] = []
    misses: list[tuple[float, float]] = []
    places: dict[int, Place] = {0: start} if 0 in plan.readings else {}
    near: Surrogate | None = None
    taken = torch.empty(0, dtype=torch.int64)
    steps, index, device = max(plan.readings), 0, net.device
    with net.restored(), surveyed(net, new, training) as work:
        for step in range(steps):
            if step in anchors:
                net.put(walker.place.theta, walker.place.weight, walker.place.bias)
                if near is not None and plan.checks:
                    misses.append(_miss(net, new, near, taken, walker.place, plan.checks))
                if order is not None:
                    taken = next(order)
                    weights = torch.full((len(taken),), 1.0 / len(taken), dtype=torch.float64)
                elif plan.exact:
                    taken = torch.arange(len(new))
                    weights = torch.full((len(taken),), 1.0 / len(taken), dtype=torch.float64)
                else:
                    taken, weights = drawn.anchor(index, anchors[step])
                chosen = new.at(taken).to(device)
                weights = weights.to(walker.place.weight)
                ahead = None if plan.exact or step > 0 else _sight(net, chosen, training, weights, walker)
                near = surrogate(net, work, chosen, training, weights, step, ahead)
                index += 1
                if plan.exact:
                    for state in walker.states:
                        state.batch = near.effective
                if keep:
                    kept.append(near)
            assert near is not None
            walker.step(near)
            if step + 1 in plan.readings:
                walker.check()
                places[step + 1] = walker.place.copy()
            on_step(step + 1)
    return Path(places, tuple(kept), tuple(walker.blind), tuple(misses))


def follow(
    net: Network,
    training: SGD | AdamW | GradientDescent,
    start: Place,
    surrogates: Sequence[Surrogate],
    steps: Sequence[int],
    batch: float,
    turns: Sequence[int] | None = None,
) -> Path:
    """Follow a training along surrogates that were taken before, without the model.

    Args:
        net: for what trains in the head.
        training: may differ from the one that they were taken for.
        start: of the path.
        surrogates: in order.
        steps: after which the place is wanted, rising.
        batch: b, samples in a batch of the run.
        turns: from which step on each surrogate is used; by default from its own.
    """
    walker = Walker(net, training, start.copy(), batch)
    turns = [near.step for near in surrogates] if turns is None else turns
    places: dict[int, Place] = {0: start} if 0 in steps else {}
    index = 0
    for step in range(max(steps, default=0)):
        while index + 1 < len(surrogates) and turns[index + 1] <= step:
            index += 1
        walker.step(surrogates[index])
        if step + 1 in steps:
            walker.check()
            places[step + 1] = walker.place.copy()
    return Path(places, tuple(surrogates), tuple(walker.blind), ())


def batch_of(training: SGD | AdamW | GradientDescent, rows: int) -> float:
    """Samples in a batch of a training; the mean of a given order."""
    if isinstance(training, GradientDescent):
        return float(rows)
    if training.order is not None:
        return sum(len(batch) for batch in training.order) / max(len(training.order), 1)
    return float(min(training.batch_size, rows))


def _sight(
    net: Network, chosen: Samples, training: SGD | AdamW | GradientDescent, weights: Tensor, walker: Walker
) -> tuple[Tensor, Tensor] | None:
    """The head after a few head-only steps. Cost: one forward pass of the anchor's samples."""
    if not net.of_head:
        return None
    near = surrogate(net, None, chosen, training, weights, 0)
    first = Place(near.features.new_zeros(0), walker.place.weight, walker.place.bias)
    ahead = follow(net, training, first, [near], [min(SIGHT_STEPS, training.steps)], walker.batch)
    (place,) = ahead.places.values()
    return place.weight, place.bias


def _miss(net: Network, new: Samples, near: Surrogate, taken: Tensor, place: Place, count: int) -> tuple[float, float]:
    """Squared error and size of the motion along its directions that `near` predicted for a few of its samples."""
    few = torch.linspace(0, len(taken) - 1, min(count, len(taken))).long()
    part = near.part(few)
    predicted = part.gradients @ place.theta - part.offsets
    moved = net.features(new.at(taken[few]).to(net.device)) - part.features
    actual = (part.directions * moved).sum(1)
    return float((predicted - actual).square().sum()), float(actual.square().sum())
