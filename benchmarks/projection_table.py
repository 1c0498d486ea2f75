"""Gradient projection on real models: `python -m benchmarks.projection_table DATA` writes docs/projection_results.md.

DATA is the folder of the shared data sets. Runs go to worker processes of one thread each. What
benchmarks/results/projection.json holds with the same settings is not run again: an interrupted table goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import product
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context

from benchmarks.machine import RESULTS, floor
from benchmarks.method_runs import Store
from benchmarks.projection_memory import memory
from benchmarks.projection_page import page
from benchmarks.projection_reading import reading
from benchmarks.projection_runs import TUNERS, Learner, Run, Table, cost_of_clip, measured
from benchmarks.projection_settings import SETTINGS, Cached
from benchmarks.tables import arguments_of

SEEDS = (0, 1, 2)
TUNING_SEED = 100
TUNING_TASKS = 5
HEAD_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
RATES = (1e-3, 3e-3, 1e-2)
TOKEN_RATES = (1e-2, 3e-2, 1e-1)
ABLATED = "minilm"
THRESHOLDS = (0.8, 0.99)
TOKENS = ("prefix", "prompt")
DOCS = Path(__file__).parents[1] / "docs" / "projection_results.md"

Data = Mapping[str, Cached]
Rates = dict[tuple[str, str | None], float]
inherited: dict[str, Any] = {}
"""What a worker was started with: the data and their folder."""


def tuning(settings: Sequence[str]) -> list[Run]:
    """What rates are chosen by, that of the head first: runs without projection, at a seed that is not in the table."""
    heads = [Run(name, None, "head", head_rate=rate) for name in settings for rate in HEAD_RATES]
    rates = {tuner: TOKEN_RATES if tuner in TOKENS else RATES for tuner in TUNERS}
    tuned = [Run(name, tuner, rate=rate) for name, tuner in product(settings, TUNERS) for rate in rates[tuner]]
    return [replace(run, seed=TUNING_SEED, tasks=TUNING_TASKS, validation=True) for run in (*heads, *tuned)]


def pairs(settings: Sequence[str]) -> list[Run]:
    """Every tuner without projection and with it."""
    return [Run(name, tuner, projection=options) for name, tuner, options in product(settings, TUNERS, (None, {}))]


def controls(settings: Sequence[str]) -> list[Run]:
    """The frozen model; and tuners that train on the first task alone."""
    learners: tuple[tuple[str | None, Learner], ...] = ((None, "means"), ("adapter", "first task"), (None, "head"))
    return [Run(name, tuner, learner) for tuner, learner in learners for name in settings]


def ablations(settings: Sequence[str]) -> list[Run]:
    """The paper's conditions where they differ, its projection of gradients, other thresholds."""
    if ABLATED not in settings:
        return []
    options = [(tuner, {"conditions": "paper"}) for tuner in TOKENS]
    options += [("adapter", {"target": "gradient"})]
    options += [(tuner, {"threshold": value}) for tuner in ("adapter", "prefix") for value in THRESHOLDS]
    return [Run(ABLATED, tuner, projection=one) for tuner, one in options]


def begin(data: Data, folder: Path) -> None:
    """In a worker, before its first run."""
    torch.set_num_threads(1)
    inherited.update(data=data, folder=folder)


def work(run: Run) -> tuple[Run, Table]:
    """In a worker."""
    return run, measured(run, inherited["data"][run.setting], inherited["folder"])


def weigh(run: Run) -> tuple[Run, Table]:
    """In a worker that does nothing else."""
    return run, memory(run, inherited["data"][run.setting], inherited["folder"])


def complete(store: Store, pool: Pool, runs: Sequence[Run], hashes: Mapping[str, str], part: str) -> None:
    """Measure what is missing of some runs; written after each."""
    place = store.all.setdefault(part, {})
    missing = [run for run in runs if place.get(run.key, {}).get("identity") != run.identity(hashes[run.setting])]
    for count, (run, found) in enumerate(pool.imap_unordered(work, missing), 1):
        place[run.key] = {"identity": run.identity(hashes[run.setting]), "row": run.row, **found}
        store.save()
        cells = " ".join(f"{name} {100 * found['metrics'][name]:.1f}" for name in ("last_accuracy", "first_minus_last"))
        cells += " means " + " ".join(
            f"{100 * found['means'][name]:.1f}" for name in ("last_accuracy", "first_minus_last")
        )
        print(f"{count} of {len(missing)}: {run.key}: {cells}, {found['cpu_seconds']:.0f} s", flush=True)


def chosen(store: Store, runs: Sequence[Run]) -> Rates:
    """Of the rates tried for a head on frozen features the one with the highest last accuracy; for a tuner the one
    that learns best: the highest accuracy on each newest task, that task told."""
    best: dict[tuple[str, str | None], tuple[float, float]] = {}
    for run in runs:
        found = store.all["tuning"][run.key]
        reached = found["metrics"]["last_accuracy"] if run.tuner is None else found["newest_told"]
        place = run.setting, run.tuner
        best[place] = max(best.get(place, (-1.0, 0.0)), (reached, run.chosen_rate))
    return {place: rate for place, (_, rate) in best.items()}


def at_rates(runs: Sequence[Run], rates: Rates) -> list[Run]:
    """Runs at the chosen rates."""
    return [
        replace(run, rate=rates.get((run.setting, run.tuner), run.rate), head_rate=rates[run.setting, None])
        for run in runs
    ]


def measure(store: Store, folder: Path, settings: Sequence[str], workers: int) -> None:
    """The whole table."""
    data = {name: SETTINGS[name].cached(folder).shared() for name in settings}
    hashes = {name: cached.hash for name, cached in data.items()}
    packages = ("torch", "transformers", "peft", "numpy")
    store.all |= {"machine": floor(), "seeds": list(SEEDS), "tuning_seed": TUNING_SEED, "tuning_tasks": TUNING_TASKS}
    store.all |= {"versions": {name: version(name) for name in packages}, "ablated": ABLATED}
    store.all |= {"tuners": {name: repr(options) for name, options in TUNERS.items()}}
    store.all.setdefault("settings", {})
    for name in settings:
        setting = SETTINGS[name]
        store.all["settings"][name] = {"title": setting.title, "optimization": asdict(setting.optimization)}
    if "vit" in data:
        store.kept(store.all, "clip", {"data": hashes["vit"]}, lambda: cost_of_clip(data["vit"], folder))
    with get_context("spawn").Pool(workers, begin, (data, folder)) as pool:
        rates: Rates = {}
        tried = tuning(settings)
        for heads in (True, False):
            some = [run for run in tried if (run.tuner is None) == heads]
            some = some if heads else at_rates(some, rates)
            complete(store, pool, some, hashes, "tuning")
            rates |= chosen(store, some)
        for part in (pairs, controls, ablations):
            rows = at_rates(part(settings), rates)
            complete(store, pool, [replace(run, seed=seed) for run in rows for seed in SEEDS], hashes, "runs")
    place = store.all.setdefault("memory", {})
    missing = [run for run in at_rates(pairs(settings), rates) if run.row not in place]
    with get_context("spawn").Pool(workers, begin, (data, folder), maxtasksperchild=1) as pool:
        for run, found in pool.imap_unordered(weigh, missing, chunksize=1):
            place[run.row] = found
            store.save()


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = arguments_of(__doc__, list(SETTINGS)).parse_args()
    measurements = Store(RESULTS / "projection.json")
    if not arguments.page:
        measure(measurements, arguments.data, arguments.settings, arguments.workers)
    DOCS.write_text(page(measurements.all, reading))
