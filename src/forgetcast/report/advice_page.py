"""The page of an advice: one small HTML file without a script, drawn from its record alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetcast.report.advice_figures import frontier
from forgetcast.report.forecast_page import render, require_keys, write_page
from forgetcast.report.run_figures import svg
from forgetcast.report.run_page import Figure

_NEEDED = ("advice", "points", "candidates", "definitions")


def is_advice(record: Mapping[str, Any]) -> bool:
    """Whether a record is that of an advice (`forgetcast advise`)."""
    return record.get("kind") == "advice"


def write_advice_report(record: Mapping[str, Any], folder: Path) -> Path:
    """Write `advice.html` into `folder`, at once or not at all.

    Args:
        record: of an advice.
        folder: made if it does not exist.

    Returns:
        The path of the page.

    Raises:
        ValueError: the record has another schema, lacks what the page shows, or has a number that JSON does not know.
    """
    return write_page(render_advice_page(record), folder / "advice.html")


def render_advice_page(record: Mapping[str, Any]) -> str:
    """The page as HTML text.

    Raises:
        ValueError: as for `write_advice_report`.
    """
    require_keys(record, _NEEDED)
    place = next(place for place, point in enumerate(record["points"]) if point["recommended"])
    figure = Figure(
        "frontier",
        svg(frontier(record), "frontier"),
        "What each choice is forecast to reach on the new task, over what it costs of the old ones: up and to the left "
        "is better. Line: the choices that no other beats. Ring: the recommended one. Crosses: forecasts that are not "
        "to be trusted. Dashed: the limit, if there is one.",
    )
    return render(
        "advice.html.j2", record, [figure], record["definitions"], best=record["points"][place], best_place=place
    )
