"""The optimiser along surrogates, without the model: where each step takes the parameters."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.memory import fitted, visits
from forgetcast.forecast.network.steps import Batching, ExpectedStep
from forgetcast.forecast.network.stock import Stock, Turn
from forgetcast.forecast.network.surrogate import TINY, Slope, Surrogate
from forgetcast.forecast.network.window import Window, profile, window
from forgetcast.forecast.simulate import batches
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, clip_factor


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

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three."""
        return self.theta, self.weight, self.bias

    def copy(self) -> "Place":
        """The same numbers elsewhere."""
        return Place(self.theta.clone(), self.weight.clone(), self.bias.clone())


@dataclass(frozen=True, eq=False)
class Path:
    """A predicted path of the parameters.

    Attributes:
        places: after each step asked for.
        surrogates: one an anchor; kept only where they are wanted again.
        windows: for each of them, how many are in use together from there on.
        shares: for each of them, which share of the body's motion is believed from there on (`halves`).
        blind: for each step, the share of the gradient outside the surrogate's directions.
        misses: for each anchor but the first, squared error and squared size of the change that the one before it
            predicted along the directions of a few samples.
        stock: features at the start that the head was trained on.
        whole: the end, with all of the body's motion, whatever share of it is believed; of `follow`.
    """

    places: dict[int, Place]
    surrogates: tuple[Surrogate, ...]
    windows: tuple[int, ...]
    shares: tuple[float, ...]
    blind: tuple[float, ...]
    misses: tuple[tuple[float, float], ...]
    stock: Stock | None = None
    whole: Place | None = None

    @property
    def surrogate_error(self) -> float | None:
        """`||predicted - actual|| / ||actual||` of the features' motion along the directions; None without a check."""
        size = sum(actual for _, actual in self.misses)
        return (sum(error for error, _ in self.misses) / size) ** 0.5 if size > 0 else None


@dataclass
class Walker:
    """The optimiser's state along a path, and the surrogates in use.

    Attributes:
        net: for what trains in the head.
        training: what is followed.
        place: the parameters now.
        batching: of the run.
        stock: features for the head's own training; without it the head sees the anchors' samples alone.
        half: of the stock that takes part, 0 or 1; None for all of it. The run's own batches take all.
        remembers: whether what the run has fitted of its samples is taken into account (`memory`), where the batches
            are not its own.
        believed: share of the body's motion that is taken for the run's (`halves`).
        blind: for each step, the share of the gradient outside the directions kept.
    """

    net: Network
    training: SGD | AdamW | GradientDescent
    place: Place
    batching: Batching
    stock: Stock | None = None
    half: int | None = None
    remembers: bool = True
    believed: float = 1.0
    blind: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        parts = self.place.parts
        self.states = [ExpectedStep(self.training, part.clone(), self.batching) for part in parts]
        trains = (len(self.place.theta) > 0, "weight" in self.net.of_head, "bias" in self.net.of_head)
        self.moving = trains
        self.order: Iterator[Tensor] | None = None
        self.turns: tuple[Turn, ...] = ()
        if self.stock is not None and self.stock.whole and not isinstance(self.training, GradientDescent):
            self.order = batches(self.training, self.batching.population)
        elif self.stock is not None:
            self.turns = self.stock.turns(self.half)
        self.origin = self.place.theta.clone()
        self.motion = torch.zeros_like(self.origin)
        self.near: Window | None = None
        self.taken: list[float] = []
        self.left: list[int] = []
        self.body: Slope | None = None
        self.profile: Tensor | None = None

    def take(self, newest: Surrogate, most: int, believed: float = 1.0) -> None:
        """From here on use this surrogate too, and of all so far the last `most`; and believe so much of the motion."""
        self.believed = believed
        shift = None
        if not self.states[0].batching.exact:
            squares = newest.gradients.square()
            shift = self.fitted(newest, squares) if self.remembers else None
            self._learn(newest, squares, shift)
        self.taken.append(newest.effective)
        self.near = window(newest, shift) if self.near is None else self.near.then(newest, shift, most)
        self.left += [len(self.blind)] * (len(self.taken) - len(self.near.parts) - len(self.left))

    def _learn(self, newest: Surrogate, squares: Tensor, shift: Tensor | None) -> None:
        """The mean profile of all anchors so far; for each as many votes as samples."""
        place = self.place
        along = window(newest, shift).pulls(newest.moved(place.theta), place.weight, place.bias)[2]
        found = profile(newest.weights, along, squares)
        share = newest.effective / (sum(self.taken) + newest.effective)
        self.profile = found if self.profile is None else self.profile.lerp_(found, share)

    def fitted(self, newest: Surrogate, squares: Tensor) -> Tensor:
        """By how much the run's own steps on these samples have moved their logits."""
        place = self.place
        often, length = visits(self.training, self.batching, len(self.blind))
        if not often:
            return newest.features.new_zeros(len(newest), len(place.bias))
        theta, weight, bias = (
            state.gain() if moves else torch.zeros_like(state.start)
            for state, moves in zip(self.states, self.moving, strict=True)
        )
        gains = theta, weight, bias
        return fitted(newest, squares, place.theta, place.weight, place.bias, gains, often, length)

    def noise(self) -> float:
        """Spread of the samples' gradients relative to their squared mean, both without bias; at most 1e6."""
        if self.near is None or self.body is None:
            return 0.0
        square = float(self.body.mean.square().sum())
        spread = max(float(self.body.second.sum()) - square, 0.0) / max(1 - 1 / self.near.effective, 1 / 3)
        return min(spread / max(square - spread / self.near.effective, 1e-6 * spread, TINY), 1e6)

    def step(self) -> None:
        """One step on the surrogates in use; of the head on the features at hand, if there are any."""
        place, near = self.place, self.near
        assert near is not None
        features = near.moved(place.theta)
        body, blind, sharp = near.body(features, place.weight, place.bias, self.profile)
        lately = self.lately()
        samples = [sharp, near.effective, near.effective]
        recent = [lately * sharp / near.effective, lately, lately]
        if self.stock is None:
            head = near.head(features, place.weight, place.bias)
        else:
            head, count, remembered = self._head(self.stock, near, features)
            samples[1:], recent[1:] = [count] * 2, [remembered] * 2
        self.blind.append(blind)
        self.body = body if self.moving[0] else None
        values = place.parts
        parts = [
            part
            for part, moves in zip(
                zip(self.states, values, (body, *head), samples, recent, strict=True), self.moving, strict=True
            )
            if moves
        ]
        factor = 1.0
        if not isinstance(self.training, GradientDescent) and self.training.max_gradient_norm is not None:
            square = sum(state.expected_square(value, slope, count) for state, value, slope, count, _ in parts)
            factor = clip_factor(self.training, max(square, 0.0) ** 0.5)
        theta, before = place.theta.clone(), None if self.net.restraint is None else place.copy()
        for state, value, slope, count, of_late in parts:
            state.step(value, slope, count, of_late, factor)
        if before is not None:
            self.net.restrain(before.parts, place.parts)
        self.motion += place.theta - theta
        if self.believed < 1 and not self.batching.few:
            torch.add(self.origin, self.motion, alpha=self.believed, out=place.theta)

    def _head(self, held: Stock, near: Window, features: Tensor) -> tuple[tuple[Slope, Slope], float, float]:
        """Slopes of the head over a turn of the stock; samples behind them; and those that the momentum remembers."""
        place = self.place
        if self.order is not None:
            turn = held.turn(next(self.order))
            for state in self.states[1:]:
                state.batching = replace(self.batching, size=float(len(turn)), exact=True)
            return held.slopes(near, features, place.weight, place.bias, turn), len(turn), len(turn)
        turn = self.turns[len(self.blind) % len(self.turns)]
        remembered = min(self.remembered() * len(turn), sum(map(len, self.turns)))
        return held.slopes(near, features, place.weight, place.bias, turn), len(turn), remembered

    def remembered(self) -> float:
        """Steps that the momentum remembers, about (1 + beta) / (1 - beta) / 2; at least one."""
        beta = self.training.betas[0] if isinstance(self.training, AdamW) else 0.0
        return max((1 + beta) / (1 - beta) / 2, 1.0)

    def lately(self) -> float:
        """Samples that were in use within the steps that the momentum remembers."""
        since = len(self.blind) - self.remembered()
        forgotten = sum(step <= since for step in self.left)
        return sum(self.taken[forgotten:])

    def told(self) -> Place:
        """Where the forecast says that the training stands: what is not believed is left out."""
        found = self.place.copy()
        if self.believed < 1:
            torch.add(self.origin, self.motion, alpha=self.believed, out=found.theta)
        return found

    def whole(self) -> Place:
        """Where it stands with all of the body's motion, whatever share of it is believed."""
        return replace(self.place, theta=self.origin + self.motion)

    def check(self) -> None:
        """Raise if the path has left the finite numbers."""
        if not all(bool(torch.isfinite(part).all()) for part in (self.place.theta, self.place.weight)):
            raise complaint("a predicted training that diverges", "one that stays finite", "Lower the learning rate.")


def follow(
    net: Network,
    training: SGD | AdamW | GradientDescent,
    start: Place,
    surrogates: Sequence[Surrogate],
    steps: Sequence[int],
    batching: Batching,
    windows: Sequence[int],
    shares: Sequence[float] = (),
    turns: Sequence[int] | None = None,
    stock: Stock | None = None,
    half: int | None = None,
) -> Path:
    """Follow a training along surrogates that were taken before, without the model.

    Args:
        net: for what trains in the head.
        training: may differ from the one that they were taken for.
        start: of the path.
        surrogates: in order.
        steps: after which the place is wanted, rising.
        batching: of the run.
        windows: for each surrogate, how many are in use together from there on, the newest and those before it.
        shares: for each, which share of the body's motion is believed from there on; all of it by default.
        turns: from which step on each surrogate is used; by default from its own.
        stock: features for the head's own training.
        half: of an incomplete stock that takes part, 0 or 1; None for all of it.
    """
    walker = Walker(net, training, start.copy(), batching, stock, half)
    places: dict[int, Place] = {0: start} if 0 in steps else {}
    shares = shares or [1.0] * len(surrogates)
    turns = [near.step for near in surrogates] if turns is None else turns
    waiting = deque(zip(turns, surrogates, windows, shares, strict=True))
    for step in range(max(steps, default=0)):
        while waiting and (waiting[0][0] <= step or (step == 0 and walker.near is None)):
            walker.take(*waiting.popleft()[1:])
        walker.step()
        if step + 1 in steps:
            walker.check()
            places[step + 1] = walker.told()
    return Path(places, tuple(surrogates), tuple(windows), tuple(shares), tuple(walker.blind), (), whole=walker.whole())


def batching_of(training: SGD | AdamW | GradientDescent, rows: int, *, fresh: bool = False) -> Batching:
    """How a training draws from so many samples; and whether it is followed from a fresh head."""
    if isinstance(training, GradientDescent):
        return Batching(float(rows), rows, few=fresh)
    if training.order is not None:
        size = sum(len(batch) for batch in training.order) / max(len(training.order), 1)
        return Batching(size, rows, few=fresh)
    return Batching(float(min(training.batch_size, rows)), rows, few=fresh)
