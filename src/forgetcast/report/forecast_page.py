"""The page of a forecast: one small HTML file without a script, drawn from its record alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetcast.checks import complaint
from forgetcast.report import forecast_figures
from forgetcast.report.page import check_schema, flatten, replace_file, script_json, template
from forgetcast.report.run_figures import svg
from forgetcast.report.run_page import SETTINGS, Figure

_NEEDED = ("forecast", "frontier", "safe", "per_class", "per_task", "calibration", "definitions")
_DEFINED = (
    "old_accuracy",
    "drop",
    "interval",
    "new_accuracy",
    "expected_cosine",
    "expected_old_cosine",
    "share_of_run",
    "relative_drift",
)
_DIAGNOSED = ("share", "alone", "missing", "kernel_change")
_MEASURED = ("accuracy_error", "cosine", "relative_error", "rank_correlation", "broken_precision", "broken_recall")


def is_forecast(record: Mapping[str, Any]) -> bool:
    """Whether a record is that of a forecast (`forgetcast forecast`)."""
    return record.get("kind") == "forecast"


def write_forecast_report(record: Mapping[str, Any], folder: Path) -> Path:
    """Write `forecast.html` into `folder`, at once or not at all.

    Args:
        record: of a forecast.
        folder: made if it does not exist.

    Returns:
        The path of the page.

    Raises:
        ValueError: the record has another schema, lacks what the page shows, or has a number that JSON does not know.
    """
    return write_page(render_forecast_page(record), folder / "forecast.html")


def write_page(page: str, path: Path) -> Path:
    """Write a page, at once or not at all; its folder is made if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return replace_file(path, page.encode())


def render_forecast_page(record: Mapping[str, Any]) -> str:
    """The page as HTML text.

    Raises:
        ValueError: as for `write_forecast_report`.
    """
    require_keys(record, _NEEDED)
    return render(
        "forecast.html.j2",
        record,
        _figures(record),
        _defined(record),
        diagnostics=record.get("diagnostics"),
        measured=() if record["calibration"] is None else _MEASURED,
    )


def require_keys(record: Mapping[str, Any], needed: Sequence[str]) -> None:
    """Check what a page of a task ahead shows.

    Raises:
        ValueError: the record has another schema, or lacks some of it.
    """
    check_schema(record)
    missing = [key for key in needed if key not in record]
    if missing:
        raise complaint(
            f"got a record without {missing}", f"the record of a {record.get('kind')} of this version", "Make it again."
        )


def render(
    name: str, record: Mapping[str, Any], figures: Iterable[Figure], defined: Iterable[str], **shown: Any
) -> str:
    """A page of a task ahead: its figures, the definitions of its numbers, and where they come from."""
    return template(name).render(
        record=record,
        record_json=script_json(record),
        method=record["recipe"]["method"]["name"],
        figures=list(figures),
        defined=list(defined),
        settings=[line for key in ("settings", *SETTINGS) if key in record for line in flatten(key, record[key])],
        **shown,
    )


def _defined(record: Mapping[str, Any]) -> Iterator[str]:
    """Names of the numbers on the page."""
    yield from _DEFINED
    if record["calibration"] is not None:
        yield from _MEASURED
    if record.get("diagnostics") is not None:
        yield from _DIAGNOSED
        if record["diagnostics"]["directions"] is not None:
            yield "energy"


def _figures(record: Mapping[str, Any]) -> Iterator[Figure]:
    yield Figure(
        "frontier",
        svg(forecast_figures.frontier(record), "frontier"),
        "What a shorter training of the same kind would keep and learn; the first point is the model as it is. Dashed "
        "across: the limit. Dotted: the last step within it. Ring: what was measured, if it was.",
    )
    yield Figure(
        "by-class",
        svg(forecast_figures.by_class(record), "by-class"),
        "Pale bar: now. Orange tick: forecast. Solid bar: measured, if it was. The largest forecast drop comes first.",
    )
