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
from forgetcast.forecast.network.stock import Stock
from forgetcast.forecast.network.surrogate import TINY, Slope, Surrogate
from forgetcast.forecast.network.window import Window, shaken_weights, window
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
        blind: for each step, the share of the gradient outside the surrogate's directions.
        misses: for each anchor but the first, squared error and squared size of the change that the one before it
            predicted along the directions of a few samples.
        stock: features at the start that the head was trained on.
    """

    places: dict[int, Place]
    surrogates: tuple[Surrogate, ...]
    windows: tuple[int, ...]
    blind: tuple[float, ...]
    misses: tuple[tuple[float, float], ...]
    stock: Stock | None = None

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
        generator: gives the steps the noise of a run's batches; none by default.
        stock: features for the head's own training; without it the head sees the anchors' samples alone.
        every: of the stock, take part only every so many; the run's own batches take all.
        remembers: whether what the run has fitted of its samples is taken into account (`memory`).
        blind: for each step, the share of the gradient outside the directions kept.
    """

    net: Network
    training: SGD | AdamW | GradientDescent
    place: Place
    batching: Batching
    generator: torch.Generator | None = None
    stock: Stock | None = None
    every: int = 1
    remembers: bool = True
    blind: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        parts = (self.place.theta, self.place.weight, self.place.bias)
        batching = replace(self.batching, noisy=self.generator is not None)
        self.states = [ExpectedStep(self.training, part.clone(), batching) for part in parts]
        trains = (len(self.place.theta) > 0, "weight" in self.net.of_head, "bias" in self.net.of_head)
        self.moving = trains
        self.order: Iterator[Tensor] | None = None
        if self.stock is not None and self.stock.whole and not isinstance(self.training, GradientDescent):
            self.order = batches(self.training, self.batching.population)
        self.near: Window | None = None
        self.taken: list[float] = []
        self.left: list[int] = []
        self.body: Slope | None = None

    def take(self, newest: Surrogate, most: int) -> None:
        """From here on use this surrogate too, and of all so far the last `most`."""
        self.taken.append(newest.effective)
        shift = self.fitted(newest) if self.remembers else None
        self.near = window(newest, shift) if self.near is None else self.near.then(newest, shift, most)
        self.left += [len(self.blind)] * (len(self.taken) - len(self.near.parts) - len(self.left))

    def fitted(self, newest: Surrogate) -> Tensor:
        """By how much the run's own steps on these samples have moved their logits."""
        place, step = self.place, len(self.blind)
        theta, weight, bias = (
            state.gain() if moves else torch.zeros_like(state.start)
            for state, moves in zip(self.states, self.moving, strict=True)
        )
        often, length = visits(self.training, self.batching, step)
        return fitted(newest, place.theta, place.weight, place.bias, (theta, weight, bias), often, length)

    def noise(self) -> float:
        """Spread of the samples' gradients relative to their squared mean, both without bias; at most 1e6."""
        if self.near is None or self.body is None:
            return 0.0
        square = float(self.body.mean.square().sum())
        spread = (float(self.body.second.sum()) - square) / max(1 - 1 / self.near.effective, 1 / 3)
        return min(spread / max(square - spread / self.near.effective, 1e-6 * spread, TINY), 1e6)

    def step(self) -> None:
        """One step on the surrogates in use; of the head on the features at hand, if there are any."""
        place, near = self.place, self.near
        assert near is not None
        features = near.moved(place.theta)
        body, *rest, blind = near.slopes(
            features, place.weight, place.bias, self._shaken(len(near.weights), near.effective)
        )
        lately = self.lately()
        samples, known = [near.effective] * 3, [lately] * 3
        if self.stock is not None:
            taken = torch.arange(0, len(self.stock.features), self.every) if self.order is None else next(self.order)
            samples[1:] = known[1:] = [float(len(taken))] * 2
            factors = self._shaken(len(taken), len(taken)) if self.order is None else None
            rest = list(self.stock.slopes(near, features, place.weight, place.bias, taken, factors))
            if self.order is not None:
                for state in self.states[1:]:
                    state.batching = replace(self.batching, size=float(len(taken)), exact=True)
        self.blind.append(blind)
        self.body = body if self.moving[0] else None
        values = (place.theta, place.weight, place.bias)
        parts = [
            part
            for part, moves in zip(
                zip(self.states, values, (body, *rest), samples, known, strict=True), self.moving, strict=True
            )
            if moves
        ]
        factor = 1.0
        if not isinstance(self.training, GradientDescent) and self.training.max_gradient_norm is not None:
            square = sum(state.expected_square(value, slope, count) for state, value, slope, count, _ in parts)
            factor = clip_factor(self.training, max(square, 0.0) ** 0.5)
        for state, value, slope, count, of_late in parts:
            state.step(value, slope, count, of_late, factor)

    def _shaken(self, count: int, effective: float) -> Tensor | None:
        if self.generator is None:
            return None
        noise = self.batching.noise(self.batching.size)
        return shaken_weights(count, effective, noise, self.generator, self.place.weight)

    def lately(self) -> float:
        """Samples that were in use within the steps that the momentum remembers, about (1 + beta) / (1 - beta) / 2."""
        beta = self.training.betas[0] if isinstance(self.training, AdamW) else 0.0
        since = len(self.blind) - (1 + beta) / (1 - beta) / 2
        forgotten = sum(step <= since for step in self.left)
        return sum(self.taken[forgotten:])

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
    turns: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    stock: Stock | None = None,
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
        turns: from which step on each surrogate is used; by default from its own.
        generator: gives the steps the noise of a run's batches, and leaves out half of an incomplete stock.
        stock: features for the head's own training.
    """
    every = 1 if generator is None else 2
    walker = Walker(net, training, start.copy(), batching, generator, stock, every)
    turns = [near.step for near in surrogates] if turns is None else turns
    places: dict[int, Place] = {0: start} if 0 in steps else {}
    waiting = deque(zip(turns, surrogates, windows, strict=True))
    for step in range(max(steps, default=0)):
        while waiting and (waiting[0][0] <= step or (step == 0 and walker.near is None)):
            walker.take(*waiting.popleft()[1:])
        walker.step()
        if step + 1 in steps:
            walker.check()
            places[step + 1] = walker.place.copy()
    return Path(places, tuple(surrogates), tuple(windows), tuple(walker.blind), ())


def batching_of(training: SGD | AdamW | GradientDescent, rows: int) -> Batching:
    """How a training draws from so many samples."""
    if isinstance(training, GradientDescent):
        return Batching(float(rows), rows)
    if training.order is not None:
        return Batching(sum(len(batch) for batch in training.order) / max(len(training.order), 1), rows)
    return Batching(float(min(training.batch_size, rows)), rows)
