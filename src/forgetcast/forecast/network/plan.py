"""How a budget is spent: readings of the old samples, a look at the new ones, and anchors along the training."""

from dataclasses import dataclass
from math import ceil

from forgetcast.checks import complaint

FORWARD = 0.47
"""A forward pass in units of one forward and one backward pass, where frozen weights take no gradient."""
ANCHOR_ROWS = 8
FIRST_ROWS = 64
WINDOW_ROWS = 16
"""Samples that the gradient is averaged over: those of the last few anchors."""
LOOK_SHARE = 0.3
LEAST_ROWS = 4
CHECK_OLD = 64
"""Old samples that are read for the two halves of a forecast together, at most: the same ones for each."""


@dataclass(frozen=True)
class Budget:
    """A plan for an anchored forecast, in units of one forward and backward pass of one sample.

    Attributes:
        run: what the training itself costs: steps x batch size.
        anchors: (step, samples) of each anchor.
        looked: new samples of which only the loss is read, to draw hard ones more often.
        readings: steps after which the old samples are read.
        checks: samples an anchor that are read again to test the one before it.
        window: anchors whose samples are in use together, at least.
        cost: of all that.
        new_cost: the new samples' part of it.
        exact: whether every step has its own batch as anchor: the run itself.
        fresh: whether the head starts without a direction, so that one anchor is in use at a time (`steps`).
    """

    run: int
    anchors: tuple[tuple[int, int], ...]
    looked: int
    readings: tuple[int, ...]
    checks: int
    window: int
    cost: float
    new_cost: float
    exact: bool
    fresh: bool = False

    @property
    def rows(self) -> int:
        """Samples of the last anchor; the first has more. 1 without anchors."""
        return self.anchors[-1][1] if self.anchors else 1

    @property
    def share(self) -> float:
        """Cost relative to the training."""
        return self.cost / self.run if self.run else 0.0


def plan_anchors(
    *,
    steps: int,
    batch: int,
    new: int,
    old: int,
    budget: float,
    readings: int = 3,
    look: bool,
    fresh: bool = False,
    half: bool = True,
    anchor_rows: int = ANCHOR_ROWS,
) -> Budget:
    """Spend `budget` of the cost of a run of `steps` batches.

    A look at the losses of all new samples gets at most a third of the budget, old readings what they cost, anchors the
    rest: evenly, as often as they can be paid for with `anchor_rows` samples each, and more samples at the start.

    Args:
        steps: of the run.
        batch: samples a step.
        new: new samples to draw from.
        old: old samples to read.
        budget: share of the run's cost; 1 or more replays the run itself.
        readings: how often old samples are read along the path, at most; fewer where they would take half the budget.
        look: whether the losses of the new samples are worth reading.
        fresh: whether no loss tells one sample from another at the start; then they are not read.
        half: whether some old samples are read twice more, for the two halves of the forecast.
        anchor_rows: samples an anchor.

    Raises:
        ValueError: a budget that does not even pay for one reading and one anchor.
    """
    run = steps * batch
    look = look and not fresh
    if steps == 0:
        return Budget(0, (), 0, (0,), 0, 1, 0.0, 0.0, exact=True)
    if budget >= 1:
        at, anchors = reading_steps(steps, readings), tuple((k, batch) for k in range(steps))
        return Budget(run, anchors, 0, at, 0, 1, run + FORWARD * old * len(at), float(run), exact=True)
    units = budget * run
    reading = FORWARD * old
    extra = check_cost(old) if half else 0.0
    most = min(units / 3, units * (1 - LOOK_SHARE * look) - LEAST_ROWS)
    count = max((k for k in range(1, readings + 1) if k * reading + extra <= most), default=1)
    left = units - count * reading - extra
    looked = min(new, int(LOOK_SHARE * units / FORWARD)) if look else 0
    left -= FORWARD * looked
    if left < LEAST_ROWS * (1 - 1e-9):
        least = (reading + extra + LEAST_ROWS) / (1 - LOOK_SHARE if look else 1)
        raise complaint(
            f"budget={budget:g} of a run of {steps} steps x {batch} samples, with {old} old samples to read",
            f"at least {ceil(1000 * least / run) / 1000:g}",
            "Raise budget, or give fewer old samples.",
        )
    rows = min(max(anchor_rows, int(left / steps)), new, max(LEAST_ROWS, int(left / 3)))
    first_rows = max(2 * rows, min(FIRST_ROWS, int(left / 4)))
    window = 1 if fresh else ceil(WINDOW_ROWS / rows)
    checks = max(1, rows // 8)
    number = min(max(1, 1 + int((left - first_rows) / (rows + FORWARD * checks))), steps)
    first = min(first_rows if number > 1 else int(left), new)
    places = sorted({round(k * steps / number) for k in range(number)})
    anchors = tuple((step, rows if step else first) for step in places)
    new_cost = (number - 1) * (rows + FORWARD * checks) + first + FORWARD * looked
    cost = new_cost + extra + count * reading
    at = reading_steps(steps, count)
    return Budget(run, anchors, looked, at, checks, window, cost, new_cost, exact=False, fresh=fresh)


def checked(old: int) -> int:
    """Old samples, of so many, on which each half of a forecast is read."""
    return ceil(min(old, CHECK_OLD) / 2)


def check_cost(old: int) -> float:
    """What reading both halves costs."""
    return 2 * FORWARD * checked(old)


def reading_steps(steps: int, count: int) -> tuple[int, ...]:
    """The end, and `count - 1` steps before it, each a third of the next."""
    return tuple(sorted({max(1, round(steps / 3**k)) for k in range(count)}))
