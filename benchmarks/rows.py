"""What the tables of rows have in common: a row's runs go to a pool, are stored one by one, and choose its rate."""

from collections.abc import Callable, Sequence
from multiprocessing.pool import Pool
from typing import Any

from benchmarks.method_runs import Store
from benchmarks.projection_runs import Table

Job = tuple[Any, ...]
"""Of a run: its row, which has a label, rate and seed; then whatever else the worker has to be told."""


def key_of(row: Any, seed: int, rate: float | None) -> str:
    """Place in the JSON."""
    return f"{row.label} / seed {seed} / rate {rate}"


def accuracies(found: Table) -> str:
    """Average and last accuracy, and processor time."""
    reached = [100 * found["metrics"][name] for name in ("average_accuracy", "last_accuracy")]
    return f"{reached[0]:.1f} {reached[1]:.1f}, {found['cpu_seconds']:.0f} s"


def complete(
    store: Store,
    place: Table,
    pool: Pool,
    work: Callable[[Any], tuple[Any, Table]],
    jobs: Sequence[Job],
    identities: Sequence[Any],
    report: Callable[[Table], str] = accuracies,
) -> Table:
    """Measure what is missing of some runs, and drop those of the same rows at other rates; written after each.

    Args:
        store: that `place` is a part of.
        place: of these runs in it.
        pool: of workers.
        work: in a worker: a job to itself and what was measured.
        jobs: the runs.
        identities: all that decides the numbers of each, in plain JSON values.
        report: of what was measured, in one line.
    """
    keys = [key_of(row, seed, rate) for row, rate, seed, *_ in jobs]
    known = dict(zip(keys, identities, strict=True))
    measured = {row.label for row, *_ in jobs}
    for key in [key for key, one in place.items() if one["label"] in measured and key not in known]:
        del place[key]
    missing = [job for job, key in zip(jobs, keys, strict=True) if place.get(key, {}).get("identity") != known[key]]
    for count, ((row, rate, seed, *_), found) in enumerate(pool.imap_unordered(work, missing), 1):
        key = key_of(row, seed, rate)
        place[key] = {"identity": known[key], "label": row.label, "seed": seed, "rate": rate, **found}
        store.save()
        print(f"{count} of {len(missing)}: {key}: {report(found)}", flush=True)
    return place


def chosen(tuned: Table) -> dict[str, float]:
    """Of each row's rates the one with the highest average accuracy: over all stages it is less noisy than the last."""
    best: dict[str, tuple[float, float]] = {}
    for one in tuned.values():
        reached = one["metrics"]["average_accuracy"]
        best[one["label"]] = max(best.get(one["label"], (-1.0, 0.0)), (reached, one["rate"]))
    return {label: rate for label, (_, rate) in best.items()}
