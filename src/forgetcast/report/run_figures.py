"""The figures of a run: drawn once as SVG, so that the page needs no script. Tasks are counted from 1."""

import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import altair as alt
import vl_convert
from markupsafe import Markup

from forgetcast.report.figures import BEFORE, MEASURED, NEUTRAL, WIDTH, heat_map, themed, vega_lite_version

Record = Mapping[str, Any]
Rows = list[dict[str, Any]]
Chart = alt.Chart | alt.LayerChart | alt.FacetChart | alt.ConcatChart

PALE = "#8fb4f0"
_SHARE = alt.Axis(format=".0%", tickCount=5)


def svg(chart: Chart, name: str) -> Markup:
    """The chart as SVG to be put into a page; its texts are escaped by the renderer.

    The renderer counts its identifiers on from chart to chart; here they begin with `name` and count from 0.
    """
    text: str = vl_convert.vegalite_to_svg(themed(chart), vl_version=vega_lite_version())
    for place, identifier in enumerate(re.findall(r'<\w+ id="(\w+)"', text)):
        for around in ('id="{}"', "url(#{})"):
            text = text.replace(around.format(identifier), around.format(f"{name}-{place}"))
    return Markup(text)


def accuracy_matrix(record: Record) -> Chart:
    """Accuracy on each task after each task, as the scenario lets a prediction choose."""
    chart: Chart = heat_map(record["accuracy_matrix"]).properties(title="Accuracy in %")
    return chart


def accuracy_by_stage(record: Record) -> Chart:
    """Mean accuracy on the tasks seen so far, with and without the task told, and accuracy on the newest task."""
    rows: Rows = []
    for name, key in (("task not told", "class_incremental_matrix"), ("task told", "task_incremental_matrix")):
        rows += [
            {"task": task, "accuracy": fmean(values), "what": f"all tasks, {name}"}
            for task, values in enumerate(record[key], start=1)
        ]
    rows += [
        {"task": task, "accuracy": values[-1], "what": "newest task"}
        for task, values in enumerate(record["accuracy_matrix"], start=1)
    ]
    names = ["all tasks, task not told", "all tasks, task told", "newest task"]
    return _lines(rows, "task", "after training task", names, "Accuracy after each task")


def anytime_accuracy(record: Record) -> Chart:
    """Mean accuracy on the tasks seen by then, at every evaluation."""
    rows: Rows = [
        {"step": entry["run_step"], "accuracy": fmean(entry["accuracy"]), "what": "all tasks seen by then"}
        for entry in record["evaluations"]
    ]
    return _lines(rows, "step", "step", ["all tasks seen by then"], "Accuracy while training")


def accuracy_by_class(record: Record) -> Chart:
    """Accuracy of each class when it was first measured and at the end; the largest drop comes first."""
    rows: Rows = [
        {"name": name, "drop": drop, "last": last, "first": last + drop}
        for name, drop, last in zip(
            record["classes"], record["per_class_drop"], record["per_class_accuracy"][-1], strict=True
        )
        if drop is not None
    ]
    sort = alt.EncodingSortField(field="drop", op="max", order="descending")
    base = alt.Chart(alt.InlineData(values=rows)).encode(y=alt.Y("name:N", sort=sort, title=None))
    base = base.transform_calculate(is_first="'when first measured'", is_last="'at the end'")
    colour = alt.Scale(domain=["when first measured", "at the end"], range=[BEFORE, MEASURED])
    layers = [
        base.mark_bar(height=alt.RelativeBandSize(size), opacity=opacity, cornerRadiusEnd=2).encode(
            x=alt.X(f"{end}:Q", title=None, axis=_SHARE, scale=alt.Scale(domain=[0, 1])),
            color=alt.Color(f"is_{end}:N", scale=colour, legend=_legend(symbolType="square")),
        )
        for end, size, opacity in (("first", 0.85, 0.38), ("last", 0.5, 1.0))
    ]
    height = alt.Step(max(15, min(36, 300 // max(1, len(rows)))))
    chart: Chart = alt.layer(*layers).properties(width=WIDTH, height=height, title="Accuracy of each class")
    return chart


def calibration_by_stage(record: Record) -> Chart:
    """Expected calibration error after each task."""
    rows: Rows = [{"task": task, "error": error} for task, error in enumerate(record["calibration_error"], start=1)]
    bars = alt.Chart(alt.InlineData(values=rows)).mark_bar(color=NEUTRAL, cornerRadiusEnd=2)
    chart: Chart = bars.encode(
        x=alt.X("task:O", title="after training task", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("error:Q", title=None, axis=_SHARE),
    ).properties(width=WIDTH, height=220, title="Expected calibration error")
    return chart


def loss_by_epoch(record: Record) -> Chart:
    """Mean training loss of each epoch; a line a task."""
    rows: Rows = [{**entry, "task": entry["task"] + 1} for entry in record["epoch_losses"]]
    lines = alt.Chart(alt.InlineData(values=rows)).mark_line(
        color=MEASURED, strokeWidth=1.5, point={"size": 18, "color": MEASURED}
    )
    chart: Chart = lines.encode(
        x=alt.X("run_step:Q", title="step", axis=alt.Axis(grid=False)),
        y=alt.Y("loss:Q", title=None),
        detail="task:N",
    ).properties(width=WIDTH, height=220, title="Training loss of each epoch")
    return chart


def _legend(**options: Any) -> alt.Legend:
    """A legend with room for the wider letters that a browser may have."""
    return alt.Legend(title=None, symbolOpacity=1, columnPadding=32, **options)


def _lines(rows: Rows, x: str, axis: str, names: list[str], title: str) -> Chart:
    kind = "Q" if x == "step" else "O"
    colours = alt.Scale(domain=names, range=[MEASURED, PALE, NEUTRAL][: len(names)])
    lines = alt.Chart(alt.InlineData(values=rows)).mark_line(point={"size": 28}, strokeWidth=1.5)
    chart: Chart = lines.encode(
        x=alt.X(f"{x}:{kind}", title=axis, axis=alt.Axis(labelAngle=0, grid=False)),
        y=alt.Y("accuracy:Q", title=None, axis=_SHARE, scale=alt.Scale(domain=[0, 1])),
        color=alt.Color("what:N", scale=colours, legend=_legend()),
    ).properties(width=WIDTH, height=300, title=title)
    return chart
