"""The record of an advice as a person reads it on a terminal. Imports no PyTorch."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from forgetcast.runs.forecast_table import Record, bare_table, heading, hundredths, left_out


def advice_lines(record: Record) -> Iterator[str]:
    """What is advised and why, what it cost, and what of the run it leaves out."""
    advice, candidates = record["advice"], len(record["candidates"])
    yield heading(record)
    yield (
        f"candidates: {candidates}, forecast at {advice['share']:.1%} of the cost of training them all, "
        f"in {advice['seconds']:.1f} s; old accuracy now {advice['accuracy_before']:.1%}, "
        f"which weighs {advice['old_weight']:.2f}"
    )
    yield f"advice: {advice['reason']}"
    yield from left_out(record)


def advice_table(record: Record) -> Table:
    """A row for each point; the recommended one is marked."""
    columns = ("what trains", "parameters", "length", "old accuracy", "drop", "new accuracy", "score", "trusted", "")
    table = bare_table("what each choice is forecast to keep and to reach", columns)
    for point in record["points"]:
        table.add_row(
            escape(point["candidate"]),
            f"{point['trained']:,}",
            f"{point['length']:g}",
            f"{point['old_accuracy']:.1%}",
            hundredths(point["drop"]),
            f"{point['new_accuracy']:.1%}",
            f"{point['score']:.3f}",
            "yes" if point["trusted"] else "no",
            "<- recommended" if point["recommended"] else "",
            style="bold" if point["recommended"] else "",
        )
    return table
