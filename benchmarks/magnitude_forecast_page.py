"""The choice by forecast against a search, as a page; every figure in it comes from the JSON."""

from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

Table = Mapping[str, Any]

HEAD = """# How much to train: the choice by forecast against an exhaustive search

Written by `python -m benchmarks.magnitude_forecast DATA` (numbers: `benchmarks/results/magnitude_forecast.json`).

A base model learns half of the tasks together; {transitions} further tasks follow (seeds {seeds}), each seed with its
own task order, tuner and samples. Before each, `fc.advise` forecasts every choice: which of the nested sets of
modules trains (the head alone, with the last 1, 2, 4, ... blocks, all of them), and how far the model then goes along
the way that this training takes it ({lengths}). An exhaustive search trains every set for real ({epochs} epochs of
AdamW, batch {batch}, loss over the new classes, their rows placed first) and measures every length.
The score is the accuracy among all classes seen, each class counting alike: old and new accuracy weighted by their
classes. The advice is given about {old} of the old test samples, of which it reads 128 at every point and more where
points are close, and reads about {new} validation samples of the new task, which do not train; the search is measured
on the other old test samples and the new test samples ({measured} in all).
The search's best is the best of all its points on the very samples that it is measured on: part of what a choice
loses is chance. The advice is asked {draws} times on each transition, each time with another draw of the samples that
it reads; the tables show the first draw, from whose choice the next task starts.

Two ways: *as_is*, the advice finds the rows placed, and what it forecasts of the head's training where blocks train too
is learnt from its few samples; *placed*, it places them itself (`head="placed"`), which takes one pass over the new
samples that the trainings need as well, and follows the head on the features of all of them. Sets of modules are
followed along the anchors of the largest. How many anchors are in use together (32) was set on the first transition of
the ViT at rate 0.003 and seed 0. Other budgets than {budget:g}, and how much of it telling
close choices apart may take, were tried on the same transitions of the ViT; docs/advise.md tells what became of them.

*Lost*: score of the search's best minus that of the advised choice. *Spread*: of its worst. *Best fixed*: the one
choice that is best on average over all transitions of a setting, found afterwards. *Cost*: passes of the advice, all
readings included, relative to those of the search, which are counted without its measuring; *seconds*: processor time
likewise, placing included on both sides. *Error*: mean absolute error of the forecast old and new accuracy over all
points."""

TITLES = (
    "| seed | transition | advised | its old / new / score | best | its old / new / score | lost | spread | "
    "all, whole way | head alone | best fixed | error old / new | cost | seconds |"
)


def page(result: Table) -> str:
    """The whole page."""
    everything = [row for rows in result["runs"].values() for row in rows]
    samples = [row["samples"] for row in everything]
    head = HEAD.format(
        transitions=max(row["transition"] for row in everything) + 1,
        seeds=", ".join(sorted({str(row["seed"]) for row in everything})),
        lengths=", ".join(f"{length:g}" for length in result["lengths"]),
        budget=result["budget"],
        epochs=result["epochs"],
        draws=result["draws"],
        batch=result["batch"],
        old=round(fmean(one["old"] for one in samples)),
        new=round(fmean(one["new"] for one in samples)),
        measured=" to ".join(str(end([one["old test"] + one["new test"] for one in samples])) for end in (min, max)),
    )
    parts = [head]
    for name, title in result["titles"].items():
        for rate, way in product(sorted({row["rate"] for row in everything}), ("as_is", "placed")):
            rows = [row for row in everything if (row["setting"], row["rate"], row["head"]) == (name, rate, way)]
            if rows:
                rows = sorted(rows, key=lambda row: (row["seed"], row["transition"]))
                lines = [f"## {title}; rate {rate:g}; {way}", "", TITLES, "|---" * TITLES.count(" | ") + "|---|"]
                place = _fixed(rows)
                lines += [_line(row, place) for row in rows]
                parts.append("\n".join([*lines, "", *_summary(rows, place)]))
    return "\n\n".join([parts[0], _over_all(everything), *parts[1:]]) + "\n"


def _over_all(rows: Sequence[Table]) -> str:
    lost = [100 * draw["lost"] for row in rows for draw in row["draws"]]
    within = sum(one <= 1 for one in lost)
    losses = _losses(rows)
    return (
        f"Over all {len(rows)} transitions and their draws: within 1 point of the search's best in {within} of "
        f"{len(lost)} choices, {fmean(lost):.2f} points lost on average, {max(lost):.1f} at most; a choice at random "
        f"is within 1 point in {fmean(loss <= 1 for loss in losses):.0%} and loses {fmean(losses):.2f} on average, "
        f"training all of it the whole way {_loses(rows, -1):.2f}, the head alone {_loses(rows, _head(rows[0])):.2f}. "
        f"Cost in passes {fmean(row['cost'] for row in rows):.2f}, in processor time "
        f"{fmean(row['seconds_share'] for row in rows):.2f} of the search, at most "
        f"{max(row['seconds_share'] for row in rows):.2f}."
    )


def _line(row: Table, fixed: int) -> str:
    points = row["points"]
    errors = [100 * fmean(abs(point[f"forecast_{side}"] - point[side]) for point in points) for side in ("old", "new")]
    spread = row["best"]["score"] - min(point["score"] for point in points)
    cells = [row["seed"], row["transition"]]
    for who in ("advised", "best"):
        cells += [_named(row[who]), " / ".join(f"{100 * row[who][key]:.1f}" for key in ("old", "new", "score"))]
    others = (points[place]["score"] for place in (-1, _head(row), fixed))
    cells += [f"{100 * value:.1f}" for value in (row["lost"], spread, *others)]
    cells += [" / ".join(f"{error:.1f}" for error in errors), f"{row['cost']:.2f}", f"{row['seconds_share']:.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


def _named(point: Table) -> str:
    return f"{point['candidate']}, {point['length']:g}"


def _head(row: Table) -> int:
    """Place of the head alone, the whole way."""
    return next(k for k, point in enumerate(row["points"]) if (point["candidate"], point["length"]) == ("head", 1))


def _fixed(rows: Sequence[Table]) -> int:
    """Place of the point with the best mean score over transitions."""
    means = [fmean(row["points"][place]["score"] for row in rows) for place in range(len(rows[0]["points"]))]
    return means.index(max(means))


def _losses(rows: Sequence[Table]) -> list[float]:
    """Points that each choice loses to the best of its transition."""
    return [100 * (row["best"]["score"] - point["score"]) for row in rows for point in row["points"]]


def _loses(rows: Sequence[Table], place: int) -> float:
    return fmean(100 * (row["best"]["score"] - row["points"][place]["score"]) for row in rows)


def _summary(rows: Sequence[Table], fixed: int) -> list[str]:
    lost = [100 * draw["lost"] for row in rows for draw in row["draws"]]
    losses = _losses(rows)
    return [
        f"- The advised choice is within 1 point of the search's best in {sum(one <= 1 for one in lost)} of "
        f"{len(lost)} choices, all draws counted; it loses {fmean(lost):.2f} on average, {max(lost):.1f} at most. "
        f"The best fixed choice ({_named(rows[0]['points'][fixed])}) loses {_loses(rows, fixed):.2f}, training all of "
        f"it the whole way {_loses(rows, -1):.2f}, the head alone {_loses(rows, _head(rows[0])):.2f}.",
        f"- A choice at random is within 1 point of the search's best in {fmean(loss <= 1 for loss in losses):.0%}, "
        f"and loses {fmean(losses):.2f} on average.",
    ]
