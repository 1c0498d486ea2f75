"""All methods side by side on real images and texts: `python -m benchmarks.rival_table DATA`.

Writes docs/rivals_results.md. DATA is the folder of the shared data sets. Each run goes to a worker process of its own,
of one thread. What benchmarks/results/rivals.json holds with the same settings is not run again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context

from benchmarks.machine import RESULTS, floor
from benchmarks.method_runs import Store
from benchmarks.projection_runs import Table
from benchmarks.projection_settings import SETTINGS, Cached
from benchmarks.rival_forecasts import BUDGET, OLD, forecast_identity, forecast_work, report
from benchmarks.rival_page import page
from benchmarks.rival_rows import ADAMW, KEPT, LEFT_OUT, RATES, ROWS, SGD, TASKS, Row
from benchmarks.rival_runs import SAMPLES, TITLES, Job, begin, cached_of, identity_of, work
from benchmarks.rows import accuracies, chosen, complete
from benchmarks.tables import arguments_of
from forgetcast.methods.registry import METHODS

SEEDS = (0, 1, 2)
TUNING_SEED = 100
DOCS = Path(__file__).parents[1] / "docs" / "rivals_results.md"
LOADED = ("benchmarks.rival_forecasts", "peft", "transformers.models.bert.modeling_bert")
"""What a worker finds imported when it starts."""


def protocol() -> Table:
    """What the page says of all runs."""
    missing = METHODS.keys() - {row.method for row in ROWS} - LEFT_OUT.keys()
    assert not missing, f"methods without a row and without a reason: {sorted(missing)}"
    packages = ("torch", "transformers", "peft", "numpy")
    return {
        "machine": floor(),
        "versions": {name: version(name) for name in packages},
        "seeds": list(SEEDS),
        "tuning_seed": TUNING_SEED,
        "tasks": TASKS,
        "kept": KEPT,
        "budget": BUDGET,
        "old": OLD,
        "optimizations": {"adamw": asdict(ADAMW), "sgd": asdict(SGD)},
        "rates": {name: list(rates) for name, rates in RATES.items()},
        "left_out": LEFT_OUT,
    }


def measure(
    store: Store,
    data: Mapping[str, Cached],
    folder: Path,
    rows: Sequence[Row],
    workers: int,
    forecast_seeds: Sequence[int],
) -> None:
    """The whole table."""
    store.all |= protocol()
    context: Any = get_context("forkserver")  # not spawn: a run has a process of its own, and imports take seconds
    context.set_forkserver_preload(list(LOADED))
    with context.Pool(workers, begin, (dict(data), folder), maxtasksperchild=1) as pool:
        for name, cached in data.items():
            measure_set(store, pool, name, cached, [row for row in rows if name not in row.absent])
        for seed in forecast_seeds:
            for name, cached in data.items():
                foresee(store, pool, name, cached, [row for row in rows if name not in row.absent], seed)
    store.save()


def measure_set(store: Store, pool: Pool, name: str, cached: Cached, rows: Sequence[Row]) -> None:
    """All runs on a data set: those that choose rates first."""
    place = part_of(store, name)
    place |= {"title": TITLES[name], "samples": SAMPLES[name], "test_samples": len(cached.test)}
    place["absent"] = {row.label: row.absent[name] for row in ROWS if name in row.absent}
    place["methods"] = {row.label: row.method for row in ROWS}
    tried = [(row, rate, TUNING_SEED, True, name) for row in rows for rate in row.rates]
    rates = place["rates"] = chosen(completed(store, pool, cached, tried, place["tuning"]))
    jobs = [(row, rates.get(row.label), seed, False, name) for seed in SEEDS for row in rows]
    completed(store, pool, cached, jobs, place["runs"])


def foresee(store: Store, pool: Pool, name: str, cached: Cached, rows: Sequence[Row], seed: int) -> None:
    """The forecasts of a seed, of rows that take steps."""
    place = part_of(store, name)
    jobs = [(row, place["rates"][row.label], seed, False, name) for row in rows if row.rates]
    kept = place["forecasts"].setdefault(str(seed), {})
    completed(store, pool, cached, jobs, kept, forecast_work, forecast_identity, report)


def part_of(store: Store, name: str) -> Table:
    """What the JSON holds of a data set."""
    found: Table = store.all.setdefault("sets", {}).setdefault(name, {})
    for part in ("tuning", "rates", "runs", "forecasts"):
        found.setdefault(part, {})
    return found


def completed(
    store: Store,
    pool: Pool,
    cached: Cached,
    jobs: Sequence[Job],
    place: Table,
    how: Callable[[Job], tuple[Job, Table]] = work,
    identity: Callable[[Job, str], Any] = identity_of,
    told: Callable[[Table], str] = accuracies,
) -> Table:
    """Some runs on a data set."""
    return complete(store, place, pool, how, jobs, [identity(job, cached.hash) for job in jobs], told)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = arguments_of(__doc__, [row.label for row in ROWS])
    parser.add_argument("--sets", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="data sets")
    parser.add_argument("--forecasts", nargs="*", type=int, choices=SEEDS, default=[0], help="seeds to forecast")
    arguments = parser.parse_args()
    results = Store(RESULTS / "rivals.json")
    if not arguments.page:
        wanted = [row for row in ROWS if row.label in arguments.settings]
        known = {name: cached_of(name, arguments.data) for name in arguments.sets}
        measure(results, known, arguments.data, wanted, arguments.workers, arguments.forecasts)
    DOCS.write_text(page(results.all))
