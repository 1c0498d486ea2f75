r"""The anchored estimator: the run's expected path through a chain of surrogates.

At each anchor a few new samples are taken at the predicted parameters (one pass forward and backward each); between
anchors the optimiser is followed in feature space at no cost in passes. With the run's own batch as anchor of every
step it is the run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from forgetcast.forecast.network.draw import Draw
from forgetcast.forecast.network.halves import Halves
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.plan import Budget
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.stock import Stock
from forgetcast.forecast.network.surrogate import Objective, Sight, Surrogate, directed, surrogate
from forgetcast.forecast.network.walker import Path, Place, Walker, batching_of, follow
from forgetcast.forecast.network.window import MOST_ROWS, anchors_in_use
from forgetcast.forecast.simulate import batches
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, Training
from forgetcast.tangent.passes import Work, prepared

LEAST_MISSES = 3
SIGHT_STEPS = 3
"""Head-only steps after which the first anchor takes its directions: a fresh head has none at the start."""

ROUNDING = 8.0
"""Features that move by less than so many roundings of their size do not move."""


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
    population: int | None = None,
    stock: Stock | None = None,
    keep: bool = True,
    most_rows: int = MOST_ROWS,
    on_step: Callable[[int], None] = lambda _: None,
) -> Path:
    """Follow the training along its anchors.

    Args:
        net: the model, at the start of the training; its parameters move and are put back.
        new: the new samples to draw from.
        training: minibatches, or full batches.
        plan: where the anchors are, and after which steps the place is wanted.
        drawn: which samples an anchor takes.
        population: new samples of the training, where `new` are some of them.
        stock: their features at the start, if they have been read: for the head's own training.
        keep: whether the surrogates are kept, for what-ifs.
        most_rows: samples of anchors in use together.
        on_step: called with the number of each step that is done.

    Raises:
        ValueError: a training that diverges.

    Cost: one pass forward and backward for every anchor sample; 4 n P a step besides.
    """
    batching = batching_of(training, population or len(new), fresh=plan.fresh)
    most = 1 if plan.fresh else max(1, most_rows // plan.rows)
    start = Place(net.theta(), net.weight(), net.bias())
    stock = None if plan.exact else stock

    def at_start() -> Walker:
        return Walker(net, training, start.copy(), batching, stock=stock, remembers=not plan.exact)

    walker = at_start()
    halves = None if plan.exact or not net.body else Halves((at_start(), at_start()))
    anchors = dict(plan.anchors)
    order = batches(training, len(new)) if plan.exact and not isinstance(training, GradientDescent) else None
    kept: list[Surrogate] = []
    windows: list[int] = []
    shares: list[float] = []
    unread = torch.ones(len(new), dtype=torch.bool)
    misses: list[tuple[float, float]] = []
    places: dict[int, Place] = {0: start} if 0 in plan.readings else {}
    newest: Surrogate | None = None
    taken = torch.empty(0, dtype=torch.int64)
    steps, index, device = max(plan.readings), 0, net.device
    with net.restored(), surveyed(net, new, training) as work:
        for step in range(steps):
            if step in anchors:
                net.put(walker.place.theta, walker.place.weight, walker.place.bias)
                if newest is not None and plan.checks:
                    misses.append(_miss(net, new, newest, taken, walker.place, plan.checks))
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
                ahead = None if plan.exact or step > 0 else _sight(net, training, walker)
                newest = surrogate(
                    net, work, chosen, training, weights, step, ahead, unread[taken].to(device), taken.to(device)
                )
                unread[taken] = False
                windows.append(plan.window if plan.exact else _in_use(walker, misses, newest, plan.window, most))
                shares.append(1.0 if halves is None else halves.take(newest, windows[-1]))
                walker.take(newest, windows[-1], shares[-1])
                index += 1
                if plan.exact:
                    for state in walker.states:
                        state.batching = replace(batching, size=newest.effective, exact=True)
                if keep:
                    kept.append(newest)
            walker.step()
            if halves is not None:
                halves.step()
            if step + 1 in plan.readings:
                walker.check()
                places[step + 1] = walker.told()
            on_step(step + 1)
    return Path(places, tuple(kept), tuple(windows), tuple(shares), tuple(walker.blind), tuple(misses), stock)


def _sight(net: Network, training: SGD | AdamW | GradientDescent, walker: Walker) -> Sight | None:
    """Gives the head after a few head-only steps on features at hand."""
    if not net.of_head:
        return None

    def ahead(phi: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        still = phi.new_zeros(len(phi), 0)
        weights = torch.full((len(phi),), 1.0 / len(phi), dtype=phi.dtype, device=phi.device)
        near = Surrogate(
            phi,
            torch.zeros_like(phi),
            still,
            still.sum(1),
            objective,
            weights,
            0,
            weights > 0,
            torch.arange(len(phi), device=phi.device),
        )
        first = Place(phi.new_zeros(0), walker.place.weight, walker.place.bias)
        free = replace(net, restraint=None)
        path = follow(free, training, first, [near], [min(SIGHT_STEPS, training.steps)], walker.batching, [1])
        (place,) = path.places.values()
        return place.weight, place.bias

    return ahead


def _in_use(walker: Walker, misses: Sequence[tuple[float, float]], newest: Surrogate, least: int, most: int) -> int:
    size = sum(actual for _, actual in misses)
    if len(misses) < LEAST_MISSES or size == 0:
        return least
    staleness = (sum(error for error, _ in misses) / size) ** 0.5
    return anchors_in_use(walker.noise(), staleness, newest.effective, least, most)


def _miss(net: Network, new: Samples, near: Surrogate, taken: Tensor, place: Place, count: int) -> tuple[float, float]:
    """Squared error and size of the motion along its directions that `near` predicted for a few of its samples."""
    few = torch.linspace(0, len(taken) - 1, min(count, len(taken))).long()
    part = near.part(few)
    predicted = part.gradients @ place.theta - part.offsets
    moved = net.features(new.at(taken[few]).to(net.device)) - part.features
    actual = (part.directions * moved).sum(1)
    rounding = ROUNDING * torch.finfo(moved.dtype).eps * part.features.norm(dim=1)
    predicted, actual = (torch.where(motion.abs() > rounding, motion, 0.0) for motion in (predicted, actual))
    return float((predicted - actual).square().sum()), float(actual.square().sum())
