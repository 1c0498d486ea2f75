"""Runs and comparisons as tables for a terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from forgetcast.runs.compare import Comparison
from forgetcast.runs.listing import Run

METRICS_SHOWN = ("average_accuracy", "last_accuracy", "first_minus_last")
_NOTHING = "-"


def runs_table(runs: Sequence[Run], root: Path) -> Table:
    """One row a run: where it is, what it is, how well it did."""
    table = Table(title=f"runs in {root}: {len(runs)}", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("directory", no_wrap=True)
    table.add_column("method")
    for column in ("seed", *METRICS_SHOWN):
        table.add_column(column.replace("_", " "), justify="right", min_width=4 if column == "seed" else 8)
    table.add_column("state", min_width=8)
    for run in runs:
        seed = run.recipe.get("seed", run.record.get("seed"))
        metrics = run.record.get("metrics", {})
        table.add_row(
            escape(run.folder.name),
            escape(str(run.keys.get("method.name", _NOTHING))),
            _NOTHING if seed is None else str(seed),
            *(_number(metrics.get(metric)) for metric in METRICS_SHOWN),
            escape(run.state),
        )
    return table


def comparison_tables(comparison: Comparison) -> list[Table]:
    """The spread of each recipe, and the difference of every two."""
    spreads = Table(title=comparison.metric, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    spreads.add_column("recipe", overflow="fold")
    for column in ("seeds", "mean", "std", "numbers stored", "more a task"):
        spreads.add_column(column, justify="right")
    for spread in comparison.spreads:
        spreads.add_row(
            escape(spread.recipe),
            str(len(spread.seeds)),
            _number(spread.mean),
            _number(spread.std),
            _count(spread.stored),
            _count(spread.growth, "+"),
        )
    differences = Table(
        title=f"second minus first, paired over seeds; {comparison.better} is better",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )
    for column in ("second", "first"):
        differences.add_column(column, overflow="fold")
    interval = f"{comparison.confidence:.0%} bootstrap interval"
    for column in ("pairs", "unpaired", "mean", "std", interval, "win / tie / loss"):
        differences.add_column(column, justify="right")
    for pair in comparison.differences:
        differences.add_row(
            escape(pair.second),
            escape(pair.first),
            str(len(pair.seeds)),
            str(pair.unpaired),
            _number(pair.mean),
            _number(pair.std),
            _NOTHING if pair.interval is None else f"{pair.interval[0]:+.4f} to {pair.interval[1]:+.4f}",
            f"{pair.wins} / {pair.ties} / {pair.losses}",
        )
    return [spreads, differences]


def _count(value: float | None, sign: str = "") -> str:
    return _NOTHING if value is None else f"{value:{sign},.0f}"


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else _NOTHING
