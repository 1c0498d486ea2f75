"""How much to train, chosen by forecast, against an exhaustive search: `python -m benchmarks.magnitude_forecast DATA`.

Writes docs/magnitude_forecasts.md. DATA is the folder of the shared data sets. Sequences of transitions go to worker
processes of one thread each; what benchmarks/results/magnitude_forecast.json holds is not run again.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing import get_context

from benchmarks.forecast_settings import Data, Setting, image_data, image_model, text_data, text_model, with_lora
from benchmarks.forecast_table import BATCH, seen_by, seen_from, started_with, taken, training_on
from benchmarks.machine import RESULTS, floor
from benchmarks.magnitude_forecast_page import page
from benchmarks.method_runs import Store
from benchmarks.tables import arguments_of
from forgetcast.backbones.weights import weights_hash
from forgetcast.forecast.network.advice import Advice, advise
from forgetcast.forecast.network.candidates import Candidate, narrowed, nested
from forgetcast.forecast.network.choice import Point
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.pilot import trained_path
from forgetcast.forecast.network.placed import place_rows
from forgetcast.forecast.network.plan import FORWARD
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.start import Head
from forgetcast.forecast.network.walker import Place
from forgetcast.forecast.training import AdamW

Table = dict[str, Any]
SEEDS = (0, 1)
RATES = (1e-3, 3e-3)
TRANSITIONS = 3
LENGTHS = (0.5, 1.0)
HEADS: tuple[Head, ...] = ("as_is", "placed")
"""Whether the advice finds the rows placed, or places them itself and keeps the features that it reads for it."""
EPOCHS = 5
BUDGET = 0.08
READ = 0.4
"""Of the old test samples of each class: what is the advice's to read; the others measure."""
DRAWS = 3
"""Advices on each transition, with other draws of samples; the first decides where the next task starts."""
TEXTS, MORE_TEXTS = 60, 10
IMAGES, MORE_IMAGES, TEST_IMAGES = 150, 15, 100
"""Samples a class: that train, that are for validation, and of the test."""

SETTINGS: Mapping[str, tuple[Setting, int]] = {
    "minilm_lora": (
        Setting(
            f"MiniLM, LoRA (r = 4) in its last 4 of 6 layers, CLINC150, 15 intents and {15 * TEXTS} texts a task",
            partial(text_data, first=2, texts=TEXTS + MORE_TEXTS),
            partial(text_model, first=2),
            base=5,
        ),
        MORE_TEXTS,
    ),
    "vit_lora": (
        Setting(
            "ViT-Tiny at 112 px, LoRA (r = 4) in its last 4 of 12 blocks, CIFAR-100, 10 classes and "
            f"{10 * IMAGES} images a task",
            partial(image_data, first=8, train=IMAGES + MORE_IMAGES, test=TEST_IMAGES),
            image_model(with_lora, first=8),
            base=5,
        ),
        MORE_IMAGES,
    ),
}
"""Each with the number of samples a class that are for validation."""
DOCS = Path(__file__).parents[1] / "docs" / "magnitude_forecasts.md"


def in_two(inputs: tuple[Tensor, ...], labels: Tensor, classes: list[int], first: int, name: str) -> list[Samples]:
    """The first so many samples of each class, and the others."""
    places = [torch.where(labels == label)[0] for label in classes]
    parts = torch.cat([own[:first] for own in places]), torch.cat([own[first:] for own in places])
    return [Samples(taken(inputs, part), labels[part], name) for part in parts]


def accuracy(net: Network, place: Place, samples: Samples, allowed: Tensor) -> float:
    """Share of samples answered right among the allowed outputs, at a place."""
    with net.restored():
        net.put(place.theta, place.weight, place.bias)
        logits = net.features(samples) @ place.weight.T + place.bias
    assert samples.targets is not None
    return float((logits.masked_fill(~allowed, -torch.inf).argmax(1) == samples.targets).double().mean())


def between(start: Place, end: Place, length: float) -> Place:
    """A place on the way."""
    return Place(*(torch.lerp(a, b, length) for a, b in zip(start.parts, end.parts, strict=True)))


def place_of(net: Network) -> Place:
    """Where the network is."""
    return Place(net.theta(), net.weight(), net.bias())


def searched(
    net: Network, tried: tuple[Candidate, ...], new: Samples, training: AdamW, sides: tuple[Samples, Samples],
    allowed: Tensor, weight: float,
) -> tuple[list[Table], float]:  # fmt: skip
    """Every candidate trained for real, every length measured; and the processor time of the trainings."""
    rows, spent = [], 0.0
    for candidate in tried:
        own = narrowed(net, candidate)
        start, started = place_of(own), process_time()
        with own.restored():
            end = trained_path(own, new, training, [training.steps]).places[training.steps]
        spent += process_time() - started
        for length in LENGTHS:
            kept, reached = (accuracy(own, between(start, end, length), side, allowed) for side in sides)
            score = weight * kept + (1 - weight) * reached
            row = {"candidate": candidate.name, "length": length, "old": kept, "new": reached, "score": score}
            rows.append(row | {"end": end})
    return rows, spent


def transition(
    model: nn.Module, data: Data, known: list[int], classes: list[int], rate: float, more: int, head: Head, seed: int
) -> Table:
    """The advice beside the search; the model ends at what was advised."""
    each = round(READ * int((data.test_labels == known[0]).sum()))
    read, kept = in_two(data.test, data.test_labels, known, each, "old")
    validation, new = in_two(data.train, data.train_labels, classes, more, "new")
    test = seen_from(data.test, data.test_labels, classes, "test")
    training = replace(training_on(new, classes, seed, EPOCHS), learning_rate=rate)
    net = seen_by(model, new)
    assert net.head is not None
    assert new.targets is not None
    if head == "as_is":
        place_rows(net.head, net.features(new), new.targets, classes)
    seen = torch.zeros(1, net.outputs, dtype=torch.bool)
    seen[0, known + classes] = True
    now = torch.zeros_like(seen)
    now[0, known] = True
    weight, placing = len(known) / len(known + classes), 0.0
    started = process_time()
    advices = [
        advise(
            model, read, new, training, lengths=LENGTHS, budget=BUDGET, old_weight=weight, validation=validation,
            head=head, answers_now=now, answers_then=seen, answers_new=seen, seed=seed + 1000 * draw,
        )
        for draw in range(DRAWS)
    ]  # fmt: skip
    spent, advice = (process_time() - started) / DRAWS, advices[0]
    if head == "placed":
        started = process_time()
        place_rows(net.head, net.features(new), new.targets, classes)
        placing = process_time() - started
    tried = nested(net)
    rows, run_spent = searched(net, tried, new, training, (kept, test), seen, weight)
    chosen = next(row for row in rows if _same(row, advice.recommended))
    own = narrowed(net, advice.recommended.candidate)
    place = between(place_of(own), chosen["end"], advice.recommended.length)
    own.put(place.theta, place.weight, place.bias)
    start = FORWARD * (len(read) + advice.new_samples) / (training.steps * BATCH * len(tried))
    told = [_told(each, rows, weight) for each in advices]
    return told[0] | {
        "draws": [{"advised": each["advised"], "lost": each["lost"]} for each in told],
        "cost": fmean(each.share for each in advices) + start,
        "seconds_share": spent / (placing + run_spent),
        "steps": training.steps,
        "samples": {"old": len(read), "new": advice.new_samples, "old test": len(kept), "new test": len(test)},
    }


def _same(row: Table, point: Point) -> bool:
    return (row["candidate"], row["length"]) == (point.candidate.name, point.length)


def _told(advice: Advice, rows: list[Table], weight: float) -> Table:
    points = [
        {"forecast_old": point.old_accuracy, "forecast_new": point.new_accuracy, "forecast_score": point.score}
        | {"trained": point.trained, "trusted": point.trusted, "old_read": point.old_samples}
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
        "old_weight": weight,
        "reason": advice.reason,
    }


def key_of(name: str, rate: float, head: Head, seed: int) -> str:
    """Place in the JSON."""
    return f"{name} / rate {rate:g} / seed {seed} / {head}"


def work(given: tuple[str, float, Head, int, Path]) -> tuple[str, list[Table]]:
    """In a worker: all transitions of a setting at a rate, with a way to place the head, and at a seed."""
    torch.set_num_threads(1)
    name, rate, head, seed, folder = given
    setting, more = SETTINGS[name]
    data = setting.data(folder)
    order = np.random.default_rng(seed).permutation(len(data.groups))
    groups = [data.groups[k] for k in order]
    every = sorted(data.train_labels.unique().tolist())
    learnt = in_two(data.train, data.train_labels, every, more, "base")[1]
    assert learnt.targets is not None
    trained = replace(data, train=learnt.inputs, train_labels=learnt.targets)
    model = started_with(setting, folder, trained, groups, seed)
    digest = weights_hash(model.state_dict())
    known = [label for group in groups[: setting.base] for label in group]
    rows = []
    for k, classes in enumerate(groups[setting.base : setting.base + TRANSITIONS]):
        found = transition(model, data, known, classes, rate, more, head, seed)
        place = {"setting": name, "rate": rate, "head": head, "seed": seed, "transition": k, "weights_hash": digest}
        rows.append(place | found)
        known = known + classes
        cells = {who: {key: found[who][key] for key in ("candidate", "length", "score")} for who in ("advised", "best")}
        print(name, rate, head, seed, k, cells, f"cost {found['cost']:.3f}", flush=True)
    return key_of(name, rate, head, seed), rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = arguments_of(__doc__, list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS[1:])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    arguments = parser.parse_args()
    store = Store(RESULTS / "magnitude_forecast.json")
    if not arguments.page:
        store.all |= {"machine": floor(), "epochs": EPOCHS, "batch": BATCH, "budget": BUDGET, "lengths": LENGTHS}
        store.all |= {"draws": DRAWS}
        store.all |= {"titles": {name: setting.title for name, (setting, _) in SETTINGS.items()}}
        done = store.all.setdefault("runs", {})
        wanted = [
            (name, rate, head, seed, arguments.data)
            for seed, rate, head, name in product(arguments.seeds, arguments.rates, arguments.heads, arguments.settings)
            if key_of(name, rate, head, seed) not in done
        ]
        with get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
            for key, rows in pool.imap_unordered(work, wanted, chunksize=1):
                done[key] = rows
                store.save()
    DOCS.write_text(page(store.all))
