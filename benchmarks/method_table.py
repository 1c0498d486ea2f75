"""Every method on the same streams, seeds and orders: `python -m benchmarks.method_table DATA` writes docs/results.md.

DATA is the folder of the shared data sets (`cifar100_deit_tiny_int8.npz`); without it the digits alone are measured.
What has been measured with the same settings is not measured again, unless `--fresh`: an interrupted table goes on.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import torch

from benchmarks import method_checks
from benchmarks.machine import RESULTS, floor
from benchmarks.method_page import page
from benchmarks.method_reading import reading
from benchmarks.method_rows import WIDE, Choice, Row, Setting, rows, settings
from benchmarks.method_runs import Store, Table, identity_of, last_accuracy, trained
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.stream import Stream

SEEDS = (0, 1, 2)
TUNING_SEED = 100
DOCS = Path(__file__).parents[1] / "docs" / "results.md"


def run(store: Store, data: Path | None, wanted: Sequence[str], *, fresh: bool) -> None:
    """Measure what is missing.

    Args:
        store: what has been measured.
        data: folder of the shared data sets.
        wanted: labels or methods of the rows to measure; all without one.
        fresh: whether what has been measured for them is thrown away first.
    """
    store.all = {"tables": {}, **({} if fresh and not wanted else store.all)}
    store.all |= {"machine": floor(), "seeds": list(SEEDS), "tuning_seed": TUNING_SEED, "wide": WIDE}
    for setting in settings(data):
        table = store.all["tables"].setdefault(setting.name, {})
        table |= {"title": setting.title, "source": setting.source.hash, "optimization": asdict(setting.optimization)}
        table["test_samples"] = len(setting.source.test)
        table |= {name: table.get(name, {}) for name in ("rows", "tuning", "checks")}
        known = {row.label: row for row in rows(setting)}
        if not wanted:  # rows of an earlier table that this one does not have
            for part in ("rows", "tuning"):
                table[part] = {label: entry for label, entry in table[part].items() if entry and label in known}
        for label, row in known.items():
            if wanted and label not in wanted and row.method not in wanted:
                continue
            if fresh:
                table["rows"].pop(label, None)
            measure(store, table, setting, row, chosen(store, table, setting, known[row.tuned_with or label]))
        if not wanted:
            check(store, table, setting, known)
    store.save()


def measure(store: Store, table: Table, setting: Setting, row: Row, choice: Choice) -> None:
    """A row at every seed."""
    entry = table["rows"].setdefault(row.label, {})
    for seed in SEEDS:
        stream = class_incremental(setting.source, setting.increment, seed=seed)

        def work(stream: Stream = stream) -> Table:
            return trained(setting, row, choice, stream)

        store.kept(entry, str(seed), identity_of(setting, row, choice, stream), work)
    last = fmean(entry[str(seed)]["metrics"]["last_accuracy"] for seed in SEEDS)
    print(f"{setting.name:8} {row.label:32} {last:.3f} {choice}", flush=True)


def validation(setting: Setting) -> Stream:
    """What choices are made on: a class order of its own, and validation samples in the place of test ones."""
    stream = class_incremental(setting.source, setting.increment, seed=TUNING_SEED, validation_share=0.2)
    return replace(stream, tasks=tuple(replace(task, test=task.validation) for task in stream.tasks))


def chosen(store: Store, table: Table, setting: Setting, row: Row) -> Choice:
    """Of the row's candidates the one with the highest last accuracy on the validation stream."""
    candidates = {", ".join(f"{key} {value:g}" for key, value in one.items()): one for one in setting.candidates(row)}
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    stream, tried = validation(setting), table["tuning"].setdefault(row.label, {})
    for name, choice in candidates.items():

        def work(choice: Choice = choice) -> Table:
            return {"last_accuracy": last_accuracy(setting, row, choice, stream)}

        store.kept(tried, name, identity_of(setting, row, choice, stream), work)
    table["tuning"][row.label] = {name: tried[name] for name in candidates}
    return candidates[max(candidates, key=lambda name: tried[name]["last_accuracy"])]


def check(store: Store, table: Table, setting: Setting, known: dict[str, Row]) -> None:
    """What the reading rests on beside the rows."""
    for label in ("analytic", "ranpac"):
        method_checks.at_once(store, table, setting, known[label], SEEDS[0])
    stream = validation(setting)
    for label in ("ewc", "kronecker_ewc", "si"):
        choice = chosen(store, table, setting, known[label])
        method_checks.strengths(store, table, setting, known[label], choice, stream)
    ceiling = known["joint, ceiling"]
    method_checks.longer(store, table, setting, ceiling, chosen(store, table, setting, ceiling), stream)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder of the shared data sets")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these rows, or all of a method")
    parser.add_argument("--fresh", action="store_true", help="measure again what has been measured")
    arguments = parser.parse_args()
    measurements = Store(RESULTS / "method_table.json")
    run(measurements, arguments.data, arguments.rows, fresh=arguments.fresh)
    DOCS.write_text(page(measurements.all, reading))
