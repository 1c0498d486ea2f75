"""The choice between trainings by what is forecast of them: pure functions of points."""

from collections.abc import Sequence
from dataclasses import dataclass

from forgetcast.checks import complaint, require_number
from forgetcast.forecast.network.candidates import Candidate

ROUNDING = 1e-12


@dataclass(frozen=True)
class Point:
    """A training that could be made: some parameters train, and the model takes some length of the way.

    Attributes:
        candidate: what trains.
        length: alpha, the share of the way from the model as it is to where the training takes it.
        trained: how many parameters train, as single numbers.
        old_accuracy: forecast accuracy of the old samples.
        drop: accuracy of the old samples now - `old_accuracy`.
        new_accuracy: forecast accuracy of new samples.
        score: old and new accuracy, smoothed, weighted by `old_weight` and the rest.
        share_of_run: what its forecast and its readings cost, relative to its training.
        old_samples: how many old samples it was read on; what is surely not the best is read on fewer (`race`).
        trusted: whether its forecast expects of itself that it can be trusted.
        reason: why, in words.
    """

    candidate: Candidate
    length: float
    trained: int
    old_accuracy: float
    drop: float
    new_accuracy: float
    score: float
    share_of_run: float
    old_samples: int
    trusted: bool
    reason: str


def choose(points: Sequence[Point], max_drop: float | None = None) -> Point:
    """The point of the highest score whose drop is within the limit.

    Of equal scores it is the one that trains the least, and of its lengths the longest.

    Where no drop is within the limit, the point of the least drop. A point counts whether its forecast is trusted or
    not: that of a head alone is exact, those of more are estimates, and to leave these out would be to always advise
    the head alone. To leave them out all the same, give only the trusted points.

    Args:
        points: at least one.
        max_drop: largest drop of old accuracy that is fine; None for any.

    Raises:
        ValueError: no point; a limit outside [0, 1].
    """
    if max_drop is not None:
        require_number("max_drop", max_drop, most=1.0)
    if not points:
        raise complaint("got no point", "at least one", "Give a candidate and a length.")
    within = [point for point in points if max_drop is None or not exceeds(point.drop, max_drop)]
    if within:
        return min(within, key=lambda point: (-round(point.score, 12), point.trained, -point.length))
    return min(points, key=lambda point: (round(point.drop, 12), -point.score, point.trained, -point.length))


def non_dominated(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other beats in drop or new accuracy without being beaten in the other; least drop first.

    Of points that are equal in both, the one that trains the least.
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.drop, -point.new_accuracy, point.trained, point.length)):
        if not kept or point.new_accuracy > kept[-1].new_accuracy:
            kept.append(point)
    return tuple(kept)


def exceeds(drop: float, max_drop: float) -> bool:
    """Whether a drop is above a limit by more than rounding."""
    return drop > max_drop + ROUNDING


def told(chosen: Point, points: Sequence[Point], max_drop: float | None = None) -> str:
    """The choice as a sentence: what it keeps and reaches, and what the largest training would."""
    most = max(points, key=lambda point: (point.trained, point.length))
    share = f"{chosen.trained:,} of {most.trained:,} parameters"
    text = f"{_named(chosen)} ({share}): forecast {_accuracies(chosen)}"
    if max_drop is not None and exceeds(chosen.drop, max_drop):
        text = f"nothing stays within a drop of {_hundredths(max_drop)} points; the least drop has {text}"
    if (most.candidate, most.length) != (chosen.candidate, chosen.length):
        text += f"; {_named(most)} would have {_accuracies(most)}"
    return text if chosen.trusted else f"{text}; {chosen.reason}"


def _named(point: Point) -> str:
    return f"'{point.candidate.name}'" + ("" if point.length == 1 else f" at {point.length:g} of the way")


def _accuracies(point: Point) -> str:
    return f"old accuracy {point.old_accuracy:.1%} (drop {_hundredths(point.drop)}), new {point.new_accuracy:.1%}"


def _hundredths(share: float) -> str:
    return f"{100 * share:.1f}"
