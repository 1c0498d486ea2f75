"""How much to train, chosen by forecast, against an exhaustive search: `python -m benchmarks.magnitude_forecast DATA`.

Writes docs/magnitude_forecasts.md. DATA is the folder of the shared data sets. Sequences of transitions go to worker
processes of one thread each; what benchmarks/results/magnitude_forecast.json holds is not run again.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from itertools import product
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing import get_context

from benchmarks.forecast_settings import SETTINGS, Data
from benchmarks.forecast_table import BATCH, EPOCHS, RATE, seen_by, seen_from, started_with, taken, training_on
from benchmarks.machine import RESULTS, floor
from benchmarks.method_runs import Store
from forgetcast.backbones.weights import weights_hash
from forgetcast.forecast.network.advice import Advice, advise
from forgetcast.forecast.network.candidates import Candidate, narrowed, nested
from forgetcast.forecast.network.choice import Point
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.pilot import trained_path
from forgetcast.forecast.network.placed import place_rows
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.walker import Place
from forgetcast.forecast.training import AdamW

Table = dict[str, Any]
NAMES = ("minilm_lora", "vit_lora")
SEEDS = (0, 1, 2)
TRANSITIONS = 3
LENGTHS = (0.5, 1.0)
BUDGET = 0.15
OLD = 225
DOCS = Path(__file__).parents[1] / "docs" / "magnitude_forecasts.md"

HEAD = """# How much to train: the choice by forecast against an exhaustive search

Written by `python -m benchmarks.magnitude_forecast DATA` (numbers: `benchmarks/results/magnitude_forecast.json`).

A base model learns half of the tasks together; {transitions} further tasks follow (seeds {seeds}), each seed with its
own task order, tuner and samples. Before each, `fc.advise` forecasts every choice: which of the nested sets of
modules trains (the head alone, with the last 1, 2, 4, ... blocks, all of them), and how far the model then goes along
the way that this training takes it ({lengths}). An exhaustive search trains every set for real ({epochs} epochs of
AdamW, rate {rate:g}, batch {batch}, loss over the new classes, their rows placed first) and measures every length.
The score is the accuracy among all classes seen, each class counting alike: old and new accuracy weighted by their
classes. The advice reads about 225 of the old test samples and new *training* samples; the search is measured on the
other old test samples and on the new test samples, so part of what a choice loses is chance: the search's best is the
best of all its points on the very samples that it is measured on. The next task starts from what the advice chose.

*Lost*: score of the search's best minus that of the advised choice. *Best fixed*: the one choice that is best on
average over all transitions of a setting, found afterwards. *Cost*: passes of the advice relative to those of the
search; *seconds*: processor time likewise. *Error*: mean absolute error of the forecast old and new accuracy over all
points."""


def old_halves(data: Data, classes: list[int]) -> tuple[Samples, Samples]:
    """Old test samples that the advice reads, about `OLD`, as many of each class; and the others."""
    read, kept, each = [], [], max(1, OLD // len(classes))
    for label in classes:
        places = torch.where(data.test_labels == label)[0]
        read.append(places[:each])
        kept.append(places[each:])
    halves = (torch.cat(read), torch.cat(kept))
    first, second = (Samples(taken(data.test, places), data.test_labels[places], "old") for places in halves)
    return first, second


def accuracy(net: Network, place: Place, samples: Samples, allowed: Tensor) -> float:
    """Share answered right among the allowed outputs, at a place."""
    with net.restored():
        net.put(place.theta, place.weight, place.bias)
        logits = net.features(samples) @ place.weight.T + place.bias
    assert samples.targets is not None
    return float((logits.masked_fill(~allowed, -torch.inf).argmax(1) == samples.targets).double().mean())


def searched(
    net: Network, tried: tuple[Candidate, ...], new: Samples, training: AdamW, sides: tuple[Samples, Samples],
    allowed: Tensor, weight: float,
) -> tuple[list[Table], float]:  # fmt: skip
    """Every candidate trained for real, every length measured; and the processor time of the trainings."""
    rows, spent = [], 0.0
    for candidate in tried:
        own = narrowed(net, candidate)
        start = Place(own.theta(), own.weight(), own.bias())
        started = process_time()
        with own.restored():
            end = trained_path(own, new, training, [training.steps]).places[training.steps]
        spent += process_time() - started
        for length in LENGTHS:
            place = Place(*(torch.lerp(a, b, length) for a, b in zip(start.parts, end.parts, strict=True)))
            kept, reached = (accuracy(own, place, side, allowed) for side in sides)
            score = weight * kept + (1 - weight) * reached
            row = {"candidate": candidate.name, "length": length, "old": kept, "new": reached, "score": score}
            rows.append(row | {"end": end})
    return rows, spent


def transition(model: nn.Module, data: Data, known: list[int], classes: list[int], seed: int) -> Table:
    """The advice beside the search; the model ends at what was advised."""
    read, kept = old_halves(data, known)
    new = seen_from(data.train, data.train_labels, classes, "new")
    test = seen_from(data.test, data.test_labels, classes, "test")
    training = training_on(new, classes, seed)
    net = seen_by(model, new)
    assert net.head is not None
    assert new.targets is not None
    place_rows(net.head, net.features(new), new.targets, classes)
    seen = torch.zeros(1, net.outputs, dtype=torch.bool)
    seen[0, known + classes] = True
    now = torch.zeros_like(seen)
    now[0, known] = True
    weight = len(known) / len(known + classes)
    started = process_time()
    advice = advise(
        model, read, new, training, lengths=LENGTHS, budget=BUDGET, old_weight=weight, answers_now=now,
        answers_then=seen, answers_new=seen, seed=seed,
    )  # fmt: skip
    spent = process_time() - started
    rows, run_spent = searched(net, nested(net), new, training, (kept, test), seen, weight)
    chosen = next(row for row in rows if _same(row, advice.recommended))
    own = narrowed(net, advice.recommended.candidate)
    place = Place(
        *(
            torch.lerp(a, b, advice.recommended.length)
            for a, b in zip((own.theta(), own.weight(), own.bias()), chosen["end"].parts, strict=True)
        )
    )
    own.put(place.theta, place.weight, place.bias)
    return _told(advice, rows, weight) | {"seconds_share": spent / run_spent, "steps": training.steps}


def _same(row: Table, point: Point) -> bool:
    return (row["candidate"], row["length"]) == (point.candidate.name, point.length)


def _told(advice: Advice, rows: list[Table], weight: float) -> Table:
    points = [
        {"forecast_old": point.old_accuracy, "forecast_new": point.new_accuracy, "forecast_score": point.score}
        | {"trained": point.trained, "trusted": point.trusted}
        | {key: row[key] for key in ("candidate", "length", "old", "new", "score")}
        for row, point in zip(rows, advice.points, strict=True)
        if _same(row, point)
    ]
    assert len(points) == len(rows)
    best = max(points, key=lambda point: point["score"])
    advised = next(point for point in points if _same(point, advice.recommended))
    return {
        "points": points,
        "advised": advised,
        "best": best,
        "lost": best["score"] - advised["score"],
        "cost": advice.share,
        "old_weight": weight,
        "reason": advice.reason,
    }


def work(given: tuple[str, int, Path]) -> tuple[str, list[Table]]:
    """In a worker: all transitions of a setting at a seed."""
    torch.set_num_threads(1)
    name, seed, folder = given
    setting = SETTINGS[name]
    data = setting.data(folder)
    order = np.random.default_rng(seed).permutation(len(data.groups))
    groups = [data.groups[k] for k in order]
    model = started_with(setting, folder, data, groups, seed)
    digest = weights_hash(model.state_dict())
    known = [label for group in groups[: setting.base] for label in group]
    rows = []
    for k, classes in enumerate(groups[setting.base : setting.base + TRANSITIONS]):
        found = transition(model, data, known, classes, seed)
        rows.append({"setting": name, "seed": seed, "transition": k, "weights_hash": digest, **found})
        known = known + classes
        cells = {who: {key: found[who][key] for key in ("candidate", "length", "score")} for who in ("advised", "best")}
        print(name, seed, k, cells, f"cost {found['cost']:.3f}", flush=True)
    return f"{name} / seed {seed}", rows


def page(result: Table) -> str:
    """Written from the JSON alone."""
    everything = [row for rows in result["runs"].values() for row in rows]
    seeds = sorted({str(row["seed"]) for row in everything})
    head = HEAD.format(
        transitions=TRANSITIONS,
        seeds=", ".join(seeds),
        epochs=EPOCHS,
        rate=RATE,
        batch=BATCH,
        lengths=", ".join(f"{length:g}" for length in LENGTHS),
    )
    parts = [head]
    for name in NAMES:
        rows = [row for row in everything if row["setting"] == name]
        if not rows:
            continue
        lines = [f"## {SETTINGS[name].title}", "", TITLES, "|---" * TITLES.count(" | ") + "|---|"]
        place = _fixed(rows)
        lines += [_line(row, place) for row in rows]
        parts.append("\n".join([*lines, "", *_summary(rows, place)]))
    return "\n\n".join(parts) + "\n"


TITLES = (
    "| seed | transition | advised | its old / new / score | best | its old / new / score | lost | all, whole way | "
    "head alone | best fixed | error old / new | cost | seconds |"
)


def _line(row: Table, fixed: int) -> str:
    points = row["points"]
    whole, head = points[-1], next(point for point in points if point["candidate"] == "head" and point["length"] == 1)
    errors = [100 * fmean(abs(point[f"forecast_{side}"] - point[side]) for point in points) for side in ("old", "new")]
    cells = [row["seed"], row["transition"]]
    for who in ("advised", "best"):
        cells += [_named(row[who]), " / ".join(f"{100 * row[who][key]:.1f}" for key in ("old", "new", "score"))]
    cells += [f"{100 * value:.1f}" for value in (row["lost"], whole["score"], head["score"], points[fixed]["score"])]
    cells += [" / ".join(f"{error:.1f}" for error in errors), f"{row['cost']:.2f}", f"{row['seconds_share']:.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


def _named(point: Table) -> str:
    return f"{point['candidate']}, {point['length']:g}"


def _fixed(rows: list[Table]) -> int:
    """Place of the point with the best mean score over transitions."""
    means = [fmean(row["points"][place]["score"] for row in rows) for place in range(len(rows[0]["points"]))]
    return means.index(max(means))


def _summary(rows: list[Table], fixed: int) -> list[str]:
    lost = [100 * row["lost"] for row in rows]
    within = sum(one <= 1 for one in lost)
    others = {
        "training all of it, the whole way": -1,
        f"the best fixed choice ({_named(rows[0]['points'][fixed])})": fixed,
    }
    told = "; ".join(
        f"{100 * fmean(row['advised']['score'] - row['points'][place]['score'] for row in rows):+.1f} against {name}"
        for name, place in others.items()
    )
    seconds = fmean(row["seconds_share"] for row in rows)
    losses = [100 * (row["best"]["score"] - point["score"]) for row in rows for point in row["points"]]
    near = fmean(loss <= 1 for loss in losses)
    return [
        f"- The advised choice is within 1 point of the search's best in {within} of {len(rows)} transitions; lost on "
        f"average {fmean(lost):.1f}, at most {max(lost):.1f} points. Mean score of the advised: {told}.",
        f"- A choice at random is within 1 point of the search's best in {near:.0%}, and loses {fmean(losses):.1f} on "
        "average.",
        f"- Cost {fmean(row['cost'] for row in rows):.2f} of the search in passes, {seconds:.2f} in processor time.",
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the shared data sets")
    parser.add_argument("--settings", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from what is there")
    arguments = parser.parse_args()
    store = Store(RESULTS / "magnitude_forecast.json")
    if not arguments.page:
        store.all |= {"machine": floor(), "rate": RATE, "epochs": EPOCHS, "batch": BATCH, "budget": BUDGET}
        done = store.all.setdefault("runs", {})
        wanted = [
            (name, seed, arguments.data)
            for seed, name in product(arguments.seeds, arguments.settings)
            if f"{name} / seed {seed}" not in done
        ]
        with get_context("spawn").Pool(arguments.workers) as pool:
            for key, rows in pool.imap_unordered(work, wanted):
                done[key] = rows
                store.save()
    DOCS.write_text(page(store.all))
