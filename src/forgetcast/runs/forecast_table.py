"""A forecast's record as a person reads it on a terminal. Imports no PyTorch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

Record = Mapping[str, Any]

WORST = 5
ROWS = 8


def forecast_lines(record: Record) -> Iterator[str]:
    """What is forecast, how far it is to be trusted, what of the run it leaves out, and what was measured."""
    found, safe = record["forecast"], record["safe"]
    limit = record["settings"]["max_drop"]
    yield heading(record)
    yield (
        f"estimator {found['estimator']}, {found['share_of_run']:.1%} of the run's cost, {found['seconds']:.1f} s: "
        f"{found['reason']}"
    )
    spread = found["interval"]
    between = "" if spread is None or spread[0] == spread[1] else f" ({spread[0]:.1%} to {spread[1]:.1%})"
    yield (
        f"old accuracy {found['accuracy_before']:.1%} -> {found['accuracy']:.1%}{between}, a drop of "
        f"{hundredths(found['drop'])} points, {'within' if found['within_limit'] else 'above'} {hundredths(limit)}"
    )
    bought = "" if safe["new_accuracy"] is None else f", new accuracy {safe['new_accuracy']:.1%}"
    yield f"within {hundredths(limit)} points: {safe['steps']} of {record['steps']} steps{bought}"
    yield from left_out(record)
    if record["calibration"] is not None:
        known = record["calibration"]
        yield (
            f"measured: old accuracy {known['measured_accuracy']:.1%}, forecast off by "
            f"{hundredths(known['accuracy_error'])} points; cosine {_number(known['cosine'])}, rank correlation of "
            f"classes {_number(known['rank_correlation'])}, broken answers: precision "
            f"{_number(known['broken_precision'])}, recall {_number(known['broken_recall'])}"
        )


def heading(record: Record) -> str:
    """Which task it is about."""
    new = ", ".join(record["classes"][output] for output in record["new_classes"])
    return f"task {record['task']} of {record['tasks']} (from 0), new classes {new}: {record['steps']} steps"


def left_out(record: Record) -> Iterator[str]:
    """What acts in the run's steps and not in the forecast's."""
    for what in record["left_out"]:
        yield f"not in the forecast: {what}"


def forecast_tables(record: Record) -> list[Table]:
    """Each old task, the classes that fall most, the frontier, and the diagnostics if there are any."""
    ways = ("before", "forecast") if record["calibration"] is None else ("before", "forecast", "measured")
    columns = ("samples", "now", *ways[1:], "drop")
    tasks = bare_table("accuracy of each old task, and its forecast drop", ("task", *columns))
    for row in record["per_task"]:
        tasks.add_row(str(row["task"]), *_shares(row, ways))
    classes = bare_table(f"the {WORST} old classes that fall most", ("class", *columns))
    for row in sorted(record["per_class"], key=_drop, reverse=True)[:WORST]:
        classes.add_row(escape(row["class"]), *_shares(row, ways))
    frontier = bare_table("what a shorter training buys", ("steps", "old accuracy", "drop", "new accuracy"))
    points = record["frontier"]
    shown = sorted({round(k * (len(points) - 1) / (ROWS - 1)) for k in range(ROWS)})
    for point in [points[k] for k in shown]:
        new = "" if point["new_accuracy"] is None else f"{point['new_accuracy']:.1%}"
        frontier.add_row(str(point["steps"]), f"{point['old_accuracy']:.1%}", hundredths(point["drop"]), new)
    return [tasks, classes, frontier, *diagnostic_tables(record)]


def diagnostic_tables(record: Record) -> Iterator[Table]:
    """The layers that carry most of the forecast drift, and the energy of the measured one by direction."""
    found = record.get("diagnostics")
    if found is None:
        return
    layers = bare_table(
        "the layers that carry most of the forecast drift",
        ("layer", "parameters", "share", "alone", "missing", "kernel change"),
    )
    for row in sorted(found["layers"], key=lambda row: abs(row["share"] or 0.0), reverse=True)[:ROWS]:
        sizes = (_number(row[name]) for name in ("share", "alone", "missing", "kernel_change"))
        layers.add_row(escape(row["layer"]), str(row["parameters"]), *sizes)
    yield layers
    if found["directions"] is not None:
        energy = bare_table("energy of the drift by direction", ("most between", "measured", "forecast", "cosine"))
        for row in found["directions"][:WORST]:
            shares = (f"{row[way]:.1%}" for way in ("measured", "predicted"))
            energy.add_row(escape(", ".join(row["classes"])), *shares, _number(row["cosine"]))
        yield energy


def _drop(row: Record) -> float:
    return float(row["accuracy_before"] - row["accuracy_forecast"])


def _shares(row: Record, ways: Sequence[str]) -> list[str]:
    return [str(row["samples"]), *(f"{row[f'accuracy_{way}']:.1%}" for way in ways), hundredths(_drop(row))]


def bare_table(title: str, columns: Sequence[str]) -> Table:
    """A table without lines, numbers to the right."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def hundredths(share: float) -> str:
    """A share of 0..1 in percent, or a difference of two in points."""
    return f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
