"""The page of a run: one small HTML file without a script, drawn from its record alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from forgetcast.checks import complaint
from forgetcast.report import run_figures
from forgetcast.report.page import (
    check_definitions,
    check_schema,
    flatten,
    replace_file,
    script_json,
    template,
)

_NEEDED = (
    "accuracy_matrix",
    "per_class_accuracy",
    "calibration_error",
    "peak_memory",
    "stored_numbers",
    "classes",
    "task_classes",
)
SETTINGS = (
    "seed",
    "class_order",
    "split_hash",
    "weights_hash",
    "source",
    "scenario",
    "recipe_hash",
    "recipe",
    "versions",
    "created",
    "seconds",
)


class Figure(NamedTuple):
    """A figure of the page: its identifier, the drawing, and how to read it."""

    name: str
    svg: Markup
    caption: str


class Stage(NamedTuple):
    """One row of the table of tasks.

    Shares are in 0..1, `drop` is just after minus at the end, `more` is how many numbers more are stored than after the
    task before.
    """

    task: int
    classes: str
    learnt: float
    last: float
    drop: float
    more: int | None


def is_run(record: Mapping[str, Any]) -> bool:
    """Whether a record is that of a run of a recipe (`forgetcast run`)."""
    return record.get("kind") == "run"


def write_run_report(record: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` into `folder`, at once or not at all.

    Args:
        record: of a finished run.
        folder: made if it does not exist.

    Returns:
        The path of the page.

    Raises:
        ValueError: the record has another schema, lacks what the page shows, has a metric without a definition, or a
            number that JSON does not know.

    Cost: about a second, most of it for starting the renderer of the figures.
    """
    page = render_run_page(record)
    folder.mkdir(parents=True, exist_ok=True)
    return replace_file(folder / "report.html", page.encode())


def render_run_page(record: Mapping[str, Any]) -> str:
    """The page as HTML text.

    Raises:
        ValueError: as for `write_run_report`.
    """
    check_schema(record)
    missing = [key for key in _NEEDED if key not in record]
    if missing:
        raise complaint(
            f"got a record without {missing}", "the record of a run of this version", "Run the recipe again."
        )
    check_definitions(record)
    return template("run.html.j2").render(
        record=record,
        record_json=script_json(record),
        method=record["recipe"]["method"]["name"],
        figures=list(_figures(record)),
        stages=_stages(record),
        settings=[line for name in SETTINGS if name in record for line in flatten(name, record[name])],
    )


def _figures(record: Mapping[str, Any]) -> Iterator[Figure]:
    def figure(name: str, chart: run_figures.Chart, caption: str) -> Figure:
        return Figure(name, run_figures.svg(chart, name), caption)

    yield figure(
        "matrix",
        run_figures.accuracy_matrix(record),
        "Read down a column to see one task being forgotten. The diagonal is each task just after it was learnt.",
    )
    yield figure(
        "by-stage",
        run_figures.accuracy_by_stage(record),
        "What telling the task is worth is the gap between the two lines of all tasks; the newest task shows how well "
        "it is still learnt.",
    )
    if any(drop is not None for drop in record["per_class_drop"]):
        yield figure(
            "by-class",
            run_figures.accuracy_by_class(record),
            "Pale bar: when the class was first measured. Solid bar: at the end. The largest drop comes first; classes "
            "of the last task had no time to be forgotten and are left out.",
        )
    yield figure("calibration", run_figures.calibration_by_stage(record), record["definitions"]["calibration_error"])
    if record["evaluations"]:
        yield figure(
            "anytime",
            run_figures.anytime_accuracy(record),
            "Every evaluation, within tasks and at their ends, each over the tasks seen by then.",
        )
    if record["epoch_losses"]:
        yield figure("loss", run_figures.loss_by_epoch(record), "One line a task, one point an epoch.")


def _stages(record: Mapping[str, Any]) -> list[Stage]:
    matrix, stored = record["accuracy_matrix"], record["stored_numbers"]
    stages = []
    for index, outputs in enumerate(record["task_classes"]):
        learnt, last = matrix[index][index], matrix[-1][index]
        names = ", ".join(record["classes"][output] for output in outputs)
        more = stored[index] - stored[index - 1] if index else None
        stages.append(Stage(index + 1, names, learnt, last, learnt - last, more))
    return stages
