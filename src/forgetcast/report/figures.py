"""The figures of a report. One Altair chart serves both the page and the picture.

Colours mean the same everywhere: grey is before training, orange is forecast, blue is measured. Charts of one task
hold the data of all tasks and filter them by the parameter `task`, which the page sets.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import vl_convert

Record = Mapping[str, Any]
Rows = list[dict[str, Any]]
Layers = alt.LayerChart | alt.FacetChart

BEFORE, FORECAST, MEASURED, NEUTRAL = "#9aa5b5", "#e07a1f", "#2f6fde", "#8a94a6"
WIDTH = 440
ROOM_FOR_BOTH = 9  # tasks, up to which a cell of the accuracy matrix holds two numbers
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def accuracy_by_task(record: Record) -> Layers:
    """Mean accuracy on all old classes before, as forecast and as measured, one row per task."""
    rows: Rows = [
        {
            "name": f"Task {entry['task']}",
            "position": entry["task"],
            "classes": ", ".join(str(name) for name in entry["classes"]),
            "samples": entry["old_samples"],
            "before": entry["forecast"]["accuracy_before"],
            "forecast": entry["forecast"]["accuracy"],
            "measured": entry["measured"]["accuracy"],
        }
        for entry in record["tasks"]
    ]
    tooltip = [alt.Tooltip("name:N", title="after"), alt.Tooltip("classes:N", title="new classes")]
    sort = alt.EncodingSortField(field="position", op="max", order="ascending")
    chart = _bullets(alt.Chart(_table(rows)), sort, tooltip)
    return _sized(chart, len(rows)).properties(title="Accuracy on all old classes")


def accuracy_by_class(record: Record) -> Layers:
    """Accuracy of each old class before, as forecast and as measured; the largest forecast drop comes first."""
    rows: Rows = [
        {
            "task": entry["task"],
            "name": str(item["class"]),
            "position": item["accuracy_before"] - item["accuracy_forecast"],
            "samples": item["samples"],
            "before": item["accuracy_before"],
            "forecast": item["accuracy_forecast"],
            "measured": item["accuracy_measured"],
        }
        for entry in record["tasks"]
        for item in entry["per_class"]
    ]
    tooltip = [alt.Tooltip("name:N", title="class"), alt.Tooltip("position:Q", title="forecast drop", format=".1%")]
    sort = alt.EncodingSortField(field="position", op="max", order="descending")
    chart = _bullets(_of_one_task(rows), sort, tooltip).add_params(_task(record))
    longest = max(len(entry["per_class"]) for entry in record["tasks"])
    return _sized(chart, longest).properties(title=_title("accuracy of each old class"))


def drift(record: Record) -> Layers:
    """Measured change of each logit against its forecast, with the line on which the two agree."""
    points: Rows = [
        {"task": entry["task"], "forecast": predicted, "measured": measured}
        for entry in record["tasks"]
        for predicted, measured in entry["drift_points"]
    ]
    ends: Rows = [
        {"task": entry["task"], "forecast": end, "measured": end}
        for entry in record["tasks"]
        for end in _extent(entry["drift_points"])
    ]
    x = alt.X("forecast:Q", title="forecast change of a logit")
    y = alt.Y("measured:Q", title="measured change")
    numbers = [alt.Tooltip("forecast:Q", format=".6g"), alt.Tooltip("measured:Q", format=".6g")]
    line = _of_one_task(ends).mark_line(color=NEUTRAL, strokeDash=[5, 4]).encode(x=x, y=y)
    dots = _of_one_task(points).mark_circle(color=MEASURED, size=34, opacity=0.5).encode(x=x, y=y, tooltip=numbers)
    chart = alt.layer(line, dots).add_params(_task(record))
    return chart.properties(width=WIDTH, height=320, title=_title("change of the outputs on old samples"))


def modes(record: Record) -> alt.ConcatChart:
    """Eigenvalue and energy of each mode, and the energy gathered up to it, with a mark at the vulnerable rank."""
    listed: Rows = [
        {"task": entry["task"], "mode": number, "eigenvalue": value, "energy": energy, "cumulative": share}
        for entry in record["tasks"]
        for number, (value, energy, share) in enumerate(
            zip(*(entry["modes"][name] for name in ("eigenvalue", "energy", "cumulative")), strict=True), start=1
        )
    ]
    ranks: Rows = [{"task": entry["task"], **entry["vulnerable_rank"]} for entry in record["tasks"]]
    longest = max(len(entry["modes"]["eigenvalue"]) for entry in record["tasks"])
    scale = alt.Scale(type="log" if longest > 100 else "linear", domainMin=1, nice=False)
    axis = alt.Axis(format="~g", grid=False)
    x = alt.X("mode:Q", title="mode", scale=scale, axis=axis)
    tooltip = [
        alt.Tooltip("mode:Q"),
        alt.Tooltip("eigenvalue:Q", format=".4g"),
        alt.Tooltip("energy:Q", format=".4g"),
        alt.Tooltip("cumulative:Q", title="energy up to here", format=".2%"),
    ]
    spectrum = _of_one_task(listed).encode(x=x, tooltip=tooltip)
    rank = _of_one_task(ranks).encode(x=alt.X("sample_modes:Q", title="mode", scale=scale, axis=axis))
    mark = rank.mark_rule(color=FORECAST, strokeWidth=1.5, strokeDash=[5, 4])

    positive = spectrum.transform_fold(["eigenvalue", "energy"], as_=["quantity", "size"])
    positive = positive.transform_filter("datum.size > 0")
    sizes = positive.mark_line(point={"size": 22}, strokeWidth=1).encode(
        y=alt.Y(
            "size:Q", title="size (log scale)", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g", tickCount=5)
        ),
        color=alt.Color("quantity:N", title=None, scale=alt.Scale(range=[NEUTRAL, FORECAST])),
    )
    share = alt.Y("cumulative:Q", title="energy up to this mode", axis=alt.Axis(format=".0%"))
    gathered = spectrum.mark_line(color=FORECAST, point={"size": 22, "color": FORECAST}, strokeWidth=1).encode(
        y=share.scale(domain=[0, 1], clamp=True)
    )
    threshold = _of_one_task(ranks).mark_rule(color=NEUTRAL, strokeDash=[2, 3]).encode(y="energy:Q")
    label = rank.transform_calculate(label="'k = ' + datum.sample_modes").mark_text(
        align="left", dx=7, dy=-9, color=FORECAST, fontSize=12, fontWeight="bold"
    )
    label = label.encode(y=alt.datum(0), text="label:N")
    panels = [alt.layer(sizes, mark), alt.layer(gathered, threshold, mark, label)]
    sized = [panel.properties(width=WIDTH, height=240) for panel in panels]
    return alt.concat(*sized, columns=2, title=_rank_titles(record)).add_params(_task(record))


def accuracy_matrix(record: Record) -> Layers:
    """Accuracy on each task after each task: measured, and below it forecast where there is room for both."""
    measured, forecast = record["accuracy_matrix"]["measured"], record["accuracy_matrix"]["forecast"]
    title = "Accuracy in %: measured (forecast)" if len(measured) <= ROOM_FOR_BOTH else "Measured accuracy in %"
    return heat_map(measured, forecast).properties(title=title)


def heat_map(measured: Sequence[Sequence[float | None]], forecast: Sequence[Sequence[float | None]] = ()) -> Layers:
    """Accuracy on each task after each task, with that forecast in small below it where there is one and room for it.

    Args:
        measured: row t: accuracy on each task after task t, None (or nothing) where there is none.
        forecast: the same, if any.
    """
    cells: Rows = [
        {
            "after": row,
            "on": column,
            "measured": value,
            "forecast": forecast[row - 1][column - 1] if forecast else None,
        }
        for row, values in enumerate(measured, start=1)
        for column, value in enumerate(values, start=1)
        if value is not None
    ]
    for cell in cells:
        cell["text"] = _percent(cell["measured"])
        cell["small"] = "" if cell["forecast"] is None else f"({_percent(cell['forecast'])})"
    both = len(measured) <= ROOM_FOR_BOTH and len(forecast) > 0
    size = min(13.0, 0.38 * WIDTH / len(measured))
    base = alt.Chart(_table(cells)).encode(
        x=alt.X("on:O", title="accuracy on the classes of task", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("after:O", title="after training task"),
        tooltip=[
            alt.Tooltip("after:O", title="after training task"),
            alt.Tooltip("on:O", title="on the classes of task"),
            alt.Tooltip("measured:Q", format=".2%"),
            *([alt.Tooltip("forecast:Q", format=".2%")] if forecast else []),
        ],
    )
    shade = alt.Scale(domain=[0, 1], range=["#edf3fd", "#1f56b8"])
    ink = alt.when("datum.measured > 0.68").then(alt.value("#ffffff")).otherwise(alt.value("#1d2733"))
    boxes = base.mark_rect(cornerRadius=3).encode(color=alt.Color("measured:Q", scale=shade, legend=None))
    texts = base.mark_text(fontSize=size, dy=-6 if both else 0).encode(text="text:N", color=ink)
    smalls = [base.mark_text(fontSize=size - 3, dy=8, opacity=0.85).encode(text="small:N", color=ink)] if both else []
    chart = alt.layer(boxes, texts, *smalls)
    return chart.properties(width=WIDTH, height=max(300, 26 * len(measured)))


def themed(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The chart's Vega-Lite specification in the report's quiet style."""
    styled = chart.configure(background="transparent", font=_FONT, padding=4)
    styled = styled.configure_view(stroke=None)
    styled = styled.configure_title(
        anchor="start",
        fontSize=13.5,
        fontWeight=600,
        offset=12,
        color="#1d2733",
    )
    styled = styled.configure_axis(
        domain=False,
        ticks=False,
        gridColor="#8a94a6",
        gridOpacity=0.22,
        labelColor="#5b6675",
        titleColor="#5b6675",
        labelFontSize=11.5,
        titleFontSize=12,
        titleFontWeight="normal",
        labelPadding=6,
        titlePadding=8,
        labelLimit=130,
    )
    styled = styled.configure_legend(orient="top", labelFontSize=12, labelColor="#5b6675", padding=0, offset=8)
    spec: dict[str, Any] = styled.to_dict(validate=False)
    return spec


def overview(record: Record) -> alt.VConcatChart:
    """All figures in one chart, those of a single task showing the last one."""
    rows = [
        alt.hconcat(accuracy_by_task(record), accuracy_matrix(record), spacing=48).resolve_scale(color="independent"),
        alt.hconcat(accuracy_by_class(record), drift(record), spacing=48).resolve_scale(color="independent"),
        modes(record),
    ]
    title = alt.Title(str(record["name"]), fontSize=20, offset=20)
    chart: alt.VConcatChart = alt.vconcat(*rows, spacing=40, title=title).resolve_scale(color="independent")
    return chart


def picture(record: Record) -> bytes:
    """The overview as PNG, at twice the resolution of the page."""
    spec = {**themed(overview(record)), "background": "#ffffff", "padding": 24}
    png: bytes = vl_convert.vegalite_to_png(spec, vl_version=vega_lite_version(), scale=2)
    return png


def vega_lite_version() -> str:
    """The version of Vega-Lite which the specifications are written for, as vl-convert names it."""
    return ".".join(alt.SCHEMA_VERSION.split(".")[:2])


def _bullets(base: alt.Chart, sort: alt.EncodingSortField, tooltip: Sequence[alt.Tooltip]) -> Layers:
    """Rows of a pale bar (before), a solid bar (measured) and a tick (forecast), each with all numbers on hover."""
    shares = [alt.Tooltip(f"{name}:Q", format=".1%") for name in ("before", "forecast", "measured")]
    constants = {f"is_{name}": f"'{name}'" for name in ("before", "forecast", "measured")}
    rows = base.transform_calculate(**constants).encode(
        y=alt.Y("name:N", sort=sort, title=None),
        tooltip=[*tooltip, *shares, alt.Tooltip("samples:Q", title="old samples")],
    )
    colours = alt.Scale(domain=["before", "forecast", "measured"], range=[BEFORE, FORECAST, MEASURED])
    legend = alt.Legend(title=None, symbolType="square", symbolOpacity=1)
    marks = {
        "before": rows.mark_bar(height=alt.RelativeBandSize(0.85), opacity=0.38, cornerRadiusEnd=2),
        "measured": rows.mark_bar(height=alt.RelativeBandSize(0.5), cornerRadiusEnd=2),
        "forecast": rows.mark_tick(thickness=3, opacity=1, height=alt.RelativeBandSize(0.95)),
    }
    axis = alt.Axis(format=".0%", orient="top", tickCount=5)
    layers = [
        mark.encode(
            x=alt.X(f"{name}:Q", title=None, axis=axis, scale=alt.Scale(domain=[0, 1])),
            color=alt.Color(f"is_{name}:N", scale=colours, legend=legend),
        )
        for name, mark in marks.items()
    ]
    return alt.layer(*layers)


def _sized(chart: Layers, rows: int) -> Layers:
    """The chart with rows high enough to be read, and higher where there are few."""
    return chart.properties(width=WIDTH, height=alt.Step(max(15, min(48, 300 // rows))))


def _task(record: Record) -> alt.Parameter:
    """The parameter which says whose task is shown; first the last one, which concerns all old classes."""
    return alt.param(name="task", value=record["tasks"][-1]["task"])


def _table(rows: Rows) -> alt.InlineData:
    """The rows as one text, which Altair passes on as it is where it would copy every row several times."""
    return alt.InlineData(values=json.dumps(rows), format=alt.JsonDataFormat(type="json"))


def _of_one_task(rows: Rows) -> alt.Chart:
    """A chart of those rows which belong to the task shown."""
    return alt.Chart(_table(rows)).transform_filter("datum.task === task")


def _title(text: str) -> alt.TitleParams:
    """A title which names the task shown."""
    return alt.Title(alt.expr(f"'Task ' + task + {json.dumps(': ' + text)}"))


def _rank_titles(record: Record) -> alt.TitleParams:
    """The vulnerable rank of the task shown, with the share of energy and the order of modes which define it."""
    lines = {
        entry["task"]: (
            f"Task {entry['task']}: vulnerable rank {rank['sample_modes']}",
            f"{_percent(rank['energy'])} % of the energy, {rank['order']} order",
        )
        for entry in record["tasks"]
        for rank in [entry["vulnerable_rank"]]
    }
    return alt.Title(alt.expr(f"({json.dumps(lines)})[task]"))


def _extent(points: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The least and the largest number among the points of a task; (0, 0) where there are none."""
    numbers = [number for point in points for number in point]
    return min(numbers, default=0.0), max(numbers, default=0.0)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
