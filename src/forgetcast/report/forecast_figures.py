"""The figures of a forecast of one task: the frontier, and each old class."""

from collections.abc import Mapping
from typing import Any

import altair as alt

from forgetcast.report.figures import BEFORE, FORECAST, MEASURED, NEUTRAL, WIDTH
from forgetcast.report.run_figures import Chart

Record = Mapping[str, Any]

_SHARE = alt.Axis(format=".0%", tickCount=5)


def frontier(record: Record) -> Chart:
    """Old accuracy over the steps of the training, and new accuracy where it is known; dashed, the limit and its end.

    The first point is the model as it is; on the logarithmic axis it stands at half a step.
    """
    names = {"old_accuracy": "old samples", "new_accuracy": "new samples"}
    rows = [
        {"steps": max(point["steps"], 0.5), "accuracy": point[key], "what": what}
        for point in record["frontier"]
        for key, what in names.items()
        if point[key] is not None
    ]
    x = alt.X("steps:Q", title="steps", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(format="~g", grid=False))
    y = alt.Y("accuracy:Q", title=None, axis=_SHARE, scale=alt.Scale(domain=[0, 1]))
    colour = alt.Scale(domain=list(names.values()), range=[FORECAST, NEUTRAL])
    lines = alt.Chart(alt.InlineData(values=rows)).mark_line(point={"size": 22}, strokeWidth=1.5)
    lines = lines.encode(x=x, y=y, color=alt.Color("what:N", scale=colour, legend=_legend("stroke")))
    least = record["forecast"]["accuracy_before"] - record["settings"]["max_drop"]
    limit = alt.Chart(alt.InlineData(values=[{"accuracy": least}])).mark_rule(color=FORECAST, strokeDash=[5, 4])
    end = alt.Chart(alt.InlineData(values=[{"steps": max(record["safe"]["steps"], 0.5)}])).mark_rule(
        color=NEUTRAL, strokeDash=[2, 3]
    )
    layers = [limit.encode(y=y), end.encode(x=x), lines]
    if record["calibration"] is not None:
        real = [{"steps": record["steps"], "accuracy": record["calibration"]["measured_accuracy"]}]
        layers.append(alt.Chart(alt.InlineData(values=real)).mark_point(color=MEASURED, size=70).encode(x=x, y=y))
    chart: Chart = alt.layer(*layers).properties(width=WIDTH, height=300, title="Accuracy over the training")
    return chart


def by_class(record: Record) -> Chart:
    """Accuracy of each old class now, as forecast, and as measured if it was; the largest forecast drop comes first."""
    ways = {"before": "now", "measured": "measured", "forecast": "forecast"}
    if record["calibration"] is None:
        del ways["measured"]
    rows = [
        {"name": row["class"], "drop": row["accuracy_before"] - row["accuracy_forecast"]}
        | {way: row[f"accuracy_{way}"] for way in ways}
        for row in record["per_class"]
    ]
    sort = alt.EncodingSortField(field="drop", op="max", order="descending")
    base = alt.Chart(alt.InlineData(values=rows)).encode(y=alt.Y("name:N", sort=sort, title=None))
    base = base.transform_calculate(**{f"is_{way}": f"'{says}'" for way, says in ways.items()})
    colour = alt.Scale(domain=["now", "forecast", "measured"][: len(ways)], range=[BEFORE, FORECAST, MEASURED])
    marks = {
        "before": base.mark_bar(height=alt.RelativeBandSize(0.85), opacity=0.38, cornerRadiusEnd=2),
        "measured": base.mark_bar(height=alt.RelativeBandSize(0.5), cornerRadiusEnd=2),
        "forecast": base.mark_tick(thickness=3, opacity=1, height=alt.RelativeBandSize(0.95)),
    }
    layers = [
        marks[way].encode(
            x=alt.X(f"{way}:Q", title=None, axis=_SHARE, scale=alt.Scale(domain=[0, 1])),
            color=alt.Color(f"is_{way}:N", scale=colour, legend=_legend("square")),
        )
        for way in ways
    ]
    height = alt.Step(max(15, min(36, 300 // len(rows))))
    chart: Chart = alt.layer(*layers).properties(width=WIDTH, height=height, title="Accuracy of each old class")
    return chart


def _legend(symbol: str) -> alt.Legend:
    """A legend with room for the wider letters that a browser may have."""
    return alt.Legend(title=None, symbolOpacity=1, columnPadding=32, symbolType=symbol)
