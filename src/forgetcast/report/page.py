"""The report page: one HTML file which needs no network, with the record inside it, and a picture beside it."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from os import getpid
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from forgetcast.checks import complaint
from forgetcast.report import figures

SCHEMA = "forgetcast.record/1"

#: How a number of each kind is shown. `share` is of 0..1 and shown in percent, as is a difference of two (`points`).
FORMATS = {
    "share": lambda number: f"{100 * number:.1f} %",
    "points": lambda number: f"{100 * number:.1f}",
    "tiny": lambda number: f"{number:.2g}",
    "cosine": lambda number: f"{number:.4f}",
    "metric": lambda number: f"{number:.4g}",
    "plain": lambda number: f"{number}",
    "count": lambda number: f"{number:,}",
    "seconds": lambda number: f"{number:.2f}",
    "mebibytes": lambda number: f"{number / 2**20:,.0f}",
}

_SETTINGS = ("seed", "class_order", "split_hash", "weights_hash", "source", "recipe", "versions", "created", "seconds")


class Figure(NamedTuple):
    """A figure of the page.

    Attributes:
        name: its identifier in the page.
        spec: its Vega-Lite specification, as JSON for a script element.
        caption: how to read it.
    """

    name: str
    spec: Markup
    caption: str


class Summary(NamedTuple):
    """What the headline says, as means over tasks of shares in 0..1.

    Attributes:
        forecast: drop of the accuracy on old classes, as forecast.
        measured: the same, as measured.
        error: absolute difference of the forecast and the measured accuracy.
        worst: the largest such difference.
    """

    forecast: float
    measured: float
    error: float
    worst: float


def write_report(record: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` and `report.png` into `folder`, each at once or not at all.

    Args:
        record: a run's record; everything in it must be fit for JSON.
        folder: made if it does not exist.

    Returns:
        The path of the page.

    Raises:
        ValueError: the record has another schema, no task after the first, a metric without a definition, or a
            number that JSON does not know (NaN, infinity).
    """
    page, picture = render_page(record), figures.picture(record)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "report.png", picture)
    return replace_file(folder / "report.html", page.encode())


def render_page(record: Mapping[str, Any]) -> str:
    """The page as HTML text.

    Raises:
        ValueError: as for `write_report`.
    """
    check_record(record)
    protected = {**record, **record["protected"]} if "protected" in record else None
    return template("report.html.j2").render(
        record=record,
        record_json=script_json(record),
        summary=summarise(record),
        overall=stream_figures(record),
        of_task=task_figures(record),
        protected=protected,
        protected_summary=protected and summarise(protected),
        protected_overall=protected and stream_figures(protected, "protected-"),
        protected_of_task=protected and task_figures(protected, "protected-"),
        settings=[line for name in _SETTINGS for line in flatten(name, record[name])],
        javascript=_javascript(),
    )


def template(name: str) -> Template:
    """A template of the pages."""
    environment = Environment(
        loader=PackageLoader("forgetcast.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["number"] = number
    environment.filters["points"] = FORMATS["points"]
    return environment.get_template(name)


def stream_figures(record: Mapping[str, Any], prefix: str = "") -> list[Figure]:
    """The figures of a whole stream; `prefix` keeps the identifiers of several streams in one page apart."""
    return [
        Figure(
            f"{prefix}by-task",
            script_json(figures.themed(figures.accuracy_by_task(record))),
            "Pale bar: before training the task. Solid bar: measured after it. Orange tick: forecast. The pale "
            "part left uncovered was forgotten; a tick at the end of the solid bar is a correct forecast.",
        ),
        Figure(
            f"{prefix}matrix",
            script_json(figures.themed(figures.accuracy_matrix(record))),
            "Read down a column to see one task being forgotten. The diagonal is each task just after it was learned.",
        ),
    ]


def task_figures(record: Mapping[str, Any], prefix: str = "") -> list[Figure]:
    """The figures of the task that is picked."""
    return [
        Figure(
            f"{prefix}by-class",
            script_json(figures.themed(figures.accuracy_by_class(record))),
            "Bars and ticks as above, one row for each old class, the largest forecast drop first. Hover over a "
            "row for its numbers.",
        ),
        Figure(
            f"{prefix}drift",
            script_json(figures.themed(figures.drift(record))),
            "One dot for each old sample and output. On the dashed line the forecast is exact.",
        ),
        Figure(
            f"{prefix}modes",
            script_json(figures.themed(figures.modes(record))),
            "Left: how strong each mode of the old features is (eigenvalue) and how much of the forecast change "
            "falls on it (energy). Right: the energy gathered up to each mode; the dashed orange line marks the "
            "vulnerable rank, where it reaches the dotted threshold.",
        ),
    ]


def check_record(record: Mapping[str, Any]) -> None:
    """Raise unless a report can be made of the record.

    Raises:
        ValueError: another schema, no task after the first, or a metric without a definition.
    """
    check_schema(record)
    if not record["tasks"]:
        raise complaint("got a record of no task", "at least one task after the first", "Use a stream of more tasks.")
    check_definitions(record)


def check_schema(record: Mapping[str, Any]) -> None:
    """Raise unless the record has the schema of this version."""
    schema = record.get("schema")
    if schema != SCHEMA:
        raise complaint(
            f"got a record of schema {schema!r}",
            f"{SCHEMA!r}",
            "Write the record again with this version of forgetcast, or install the version that wrote it.",
        )


def check_definitions(record: Mapping[str, Any]) -> None:
    """Raise unless every metric of the record has a definition."""
    undefined = [name for name in record["metrics"] if name not in record["definitions"]]
    if undefined:
        raise complaint(
            f"got the metrics {undefined} without a definition",
            "a definition of every metric",
            "Add them to record['definitions'].",
        )


def summarise(record: Mapping[str, Any]) -> Summary:
    """Means over tasks of the forecast and measured drops, and of the errors of the forecast."""
    before = [entry["forecast"]["accuracy_before"] for entry in record["tasks"]]
    forecast = [entry["forecast"]["accuracy"] for entry in record["tasks"]]
    measured = [entry["measured"]["accuracy"] for entry in record["tasks"]]
    errors = [abs(a - b) for a, b in zip(forecast, measured, strict=True)]
    return Summary(fmean(before) - fmean(forecast), fmean(before) - fmean(measured), fmean(errors), max(errors))


def number(key: str, value: float | None, kind: str) -> Markup:
    """A number that can be read back: `key` is its path in the record, `kind` one of `FORMATS`; None is `n/a`."""
    text = "n/a" if value is None else FORMATS[kind](value)
    return Markup('<span data-key="{}" data-value="{}">{}</span>').format(key, json.dumps(value), text)


def flatten(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`key = value` lines of a nested setting: mappings by `key.name`, lists of plain values as one text."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from flatten(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        yield key, ", ".join(str(item) for item in value)
    else:
        yield key, value


def script_json(value: Any) -> Markup:
    """JSON which is safe inside a script element, whatever its strings hold.

    Raises:
        ValueError: a number that JSON does not know.
    """
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))


@cache
def _javascript() -> Markup:
    """Vega, Vega-Lite and Vega-Embed in one script."""
    return Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=figures.vega_lite_version()))


def replace_file(path: Path, content: bytes) -> Path:
    """Write `path` through a neighbour, so that no reader ever sees half of it."""
    partial = path.with_name(f".{path.name}.{getpid()}.partial")
    try:
        partial.write_bytes(content)
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
