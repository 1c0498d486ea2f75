"""The figure of an advice: what each choice is forecast to keep and to reach."""

from collections.abc import Mapping
from typing import Any

import altair as alt

from forgetcast.report.figures import FORECAST, NEUTRAL, WIDTH
from forgetcast.report.run_figures import Chart

_SHARE = alt.Axis(format=".0%", tickCount=5)


def frontier(record: Mapping[str, Any]) -> Chart:
    """New accuracy over the drop of old accuracy; a line through the choices that no other beats.

    A ring marks the recommended choice, crosses forecasts that are not to be trusted, a dashed line the limit.
    """
    rows = [
        {key: point[key] for key in ("drop", "new_accuracy", "frontier", "recommended")}
        | {"label": _label(point), "shape": "trusted" if point["trusted"] else "not trusted"}
        for point in record["points"]
    ]
    x = alt.X("drop:Q", title="drop of old accuracy", axis=_SHARE, scale=alt.Scale(zero=False, nice=True, padding=24))
    y = alt.Y("new_accuracy:Q", title="new accuracy", axis=_SHARE, scale=alt.Scale(zero=False, nice=True, padding=16))
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y)
    marks = alt.Scale(domain=["trusted", "not trusted"], range=["circle", "cross"])
    layers = [
        base.transform_filter("datum.frontier").mark_line(color=NEUTRAL, strokeWidth=1.5).encode(order="drop:Q"),
        base.mark_point(color=FORECAST, filled=True, opacity=1, size=55).encode(
            shape=alt.Shape("shape:N", scale=marks, legend=None)
        ),
        base.transform_filter("datum.recommended").mark_point(color=FORECAST, size=240, strokeWidth=2),
        base.mark_text(align="left", dx=9, dy=13, color=NEUTRAL).encode(text="label:N"),
    ]
    limit = record["settings"]["max_drop"]
    if limit is not None:
        rule = alt.Chart(alt.InlineData(values=[{"drop": limit}])).mark_rule(color=FORECAST, strokeDash=[5, 4])
        layers.append(rule.encode(x=x))
    chart: Chart = alt.layer(*layers).properties(width=WIDTH, height=300, title="What each choice keeps and reaches")
    return chart


def _label(point: Mapping[str, Any]) -> str:
    return str(point["candidate"]) + ("" if point["length"] == 1 else f" x {point['length']:g}")
