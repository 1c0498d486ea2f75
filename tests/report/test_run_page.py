"""The page of a run: every number on it is the record's, nothing on it can run or leave the machine."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from pages import HOSTILE, at, needs_browser, open_page

from forgetcast.metrics.definitions import RUN_DEFINITIONS
from forgetcast.metrics.matrix import all_metrics
from forgetcast.metrics.transfer import per_class_first_minus_last
from forgetcast.report.page import FORMATS
from forgetcast.report.run_page import render_run_page, write_run_report

FIGURES = ["matrix", "by-stage", "by-class", "calibration", "anytime", "loss"]


def make_run(tasks: int = 4, per_task: int = 2) -> dict[str, Any]:
    """A record as `forgetcast run` writes it, with seeded numbers."""
    draw = np.random.default_rng(0)
    classes = tasks * per_task
    per_class: list[list[float | None]] = [
        [float(draw.uniform()) if c < (t + 1) * per_task else None for c in range(classes)] for t in range(tasks)
    ]
    matrix = [draw.uniform(size=t + 1).tolist() for t in range(tasks)]
    told = [[value**0.3 for value in row] for row in matrix]
    steps = [10 * (t + 1) for t in range(tasks)]
    more = {"expected_calibration_error": 0.0812345, "average_anytime_accuracy": 0.6123456}
    return {
        "schema": "forgetcast.record/1",
        "kind": "run",
        "name": "digits_sequential",
        "created": "2026-11-21T10:00:00+00:00",
        "versions": {"forgetcast": "0.1.0", "torch": "2.13.0"},
        "recipe": {"method": {"name": "sequential"}, "training": {"epochs": 2}},
        "recipe_hash": "sha256:77",
        "seed": 3,
        "source": {"name": "digits", "samples": 1797, "hash": "ab12"},
        "class_order": draw.permutation(classes).tolist(),
        "split_hash": "sha256:3f1c",
        "weights_hash": {"backbone_at_start": "sha256:0", "model_at_end": "sha256:1"},
        "definitions": dict(RUN_DEFINITIONS),
        "scenario": "class-incremental",
        "classes": [f"class {c}" for c in range(classes)],
        "task_classes": [list(range(t * per_task, (t + 1) * per_task)) for t in range(tasks)],
        "accuracy_matrix": matrix,
        "class_incremental_matrix": matrix,
        "task_incremental_matrix": told,
        "metrics": all_metrics(matrix) | more,
        "class_incremental_metrics": all_metrics(matrix),
        "task_incremental_metrics": all_metrics(told),
        "per_class_accuracy": per_class,
        "per_class_drop": per_class_first_minus_last(per_class),
        "calibration_error": draw.uniform(size=tasks).tolist(),
        "evaluations": [{"task": t, "run_step": steps[t], "accuracy": matrix[t]} for t in range(tasks)],
        "epoch_losses": [{"task": t, "run_step": steps[t] - e, "loss": 1.0 + e} for t in range(tasks) for e in (5, 0)],
        "trainable_parameters": [1000 + t for t in range(tasks)],
        "stored_numbers": [20000 + t for t in range(tasks)],
        "seconds_training": draw.uniform(size=tasks).tolist(),
        "seconds_evaluation": draw.uniform(size=tasks).tolist(),
        "peak_memory": {"definition": "peak_resident_set_size", "bytes": [500 * 2**20 + t for t in range(tasks)]},
        "seconds": 12.3,
    }


class Read(HTMLParser):
    """The elements of a page, the numbers it names and the text of its cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[tuple[str, float | None, str]] = []
        self.text = ""
        self.record = ""
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append((tag, dict(attrs)))
        if "data-key" in dict(attrs):
            self.numbers.append((dict(attrs)["data-key"], json.loads(dict(attrs)["data-value"]), ""))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tag, attributes = self._open[-1] if self._open else ("", {})
        if "data-key" in attributes:
            key, value, _ = self.numbers[-1]
            self.numbers[-1] = (key, value, data)
        if tag == "script":
            self.record += data
        elif tag != "style":
            self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    return render_run_page(make_run())


@pytest.fixture
def record() -> dict[str, Any]:
    return make_run()


def kind_of(key: str) -> str:
    if key.startswith(("metrics.", "class_incremental_metrics.", "task_incremental_metrics.")):
        return "metric"
    kinds = {"accuracy_matrix": "share", "per_class_accuracy": "share", "per_class_drop": "points"}
    kinds |= {"calibration_error": "cosine", "peak_memory": "mebibytes"}
    kinds |= dict.fromkeys(("seconds_training", "seconds_evaluation"), "seconds")
    kinds |= dict.fromkeys(("trainable_parameters", "stored_numbers"), "count")
    return kinds.get(key.split(".")[0], "plain")


def test_every_number_is_the_record_s(page, record):
    numbers = Read(page).numbers
    headline = {"metrics.last_accuracy": "share", "metrics.learning_accuracy": "share"}
    headline["metrics.first_minus_last"] = "points"
    for place, (key, value, text) in enumerate(numbers):
        assert value == at(record, key), key
        assert text == FORMATS[headline[key] if place < 3 else kind_of(key)](value), key
    named = {key for key, _, _ in numbers}
    for group in ("metrics", "class_incremental_metrics", "task_incremental_metrics"):
        assert {f"{group}.{name}" for name in record[group]} <= named
    for group in ("calibration_error", "seconds_training", "seconds_evaluation", "peak_memory.bytes"):
        assert {f"{group}.{task}" for task in range(4)} <= named
    assert {f"per_class_accuracy.3.{c}" for c in range(8)} | {f"per_class_drop.{c}" for c in range(6)} <= named


def test_the_growth_of_what_is_stored_is_told(record):
    record["stored_numbers"] = [20000, 21234, 21234, 20000]
    table = re.search(r'<table id="tasks">.*?</table>', render_run_page(record), re.DOTALL)
    assert table is not None
    rows = re.findall(r"<tr>\n(.*?)</tr>", table[0].split("<tbody>")[1], re.DOTALL)
    assert [re.findall(r"<td>([^<]*)</td>\n$", row) for row in rows] == [[""], ["+1,234"], ["+0"], ["-1,234"]]


def test_every_definition_and_setting_is_told(page, record):
    text = " ".join(Read(page).text.split())
    for name in (*record["metrics"], "calibration_error", "peak_resident_set_size", "stored_numbers"):
        assert record["definitions"][name] in text, name
    for setting in ("sha256:3f1c", "sha256:1", "sha256:77", "2.13.0", "recipe.training.epochs"):
        assert setting in text
    assert json.loads(Read(page).record) == record


def test_figures_show_the_record(page, record):
    assert re.findall(r'<figure id="([\w-]+)"', page) == FIGURES
    drawings = dict(zip(FIGURES, re.findall(r"<svg.*?</svg>", page, re.DOTALL), strict=True))
    shown = re.findall(r">(\d+\.\d)</text>", drawings["matrix"])
    assert sorted(shown) == sorted(f"{100 * value:.1f}" for row in record["accuracy_matrix"] for value in row)
    assert len(re.findall('aria-label="first', drawings["by-class"])) == 6
    names = re.findall(r">(class \d)</text>", drawings["by-class"])
    drops = dict(zip(record["classes"], record["per_class_drop"], strict=True))
    assert names == sorted(names, key=lambda name: -drops[name])


def test_nothing_can_run_or_leave_the_machine(page):
    tags = Read(page).tags
    assert [attributes for tag, attributes in tags if tag == "script"] == [{"type": "application/json", "id": "record"}]
    policy = next(attributes["content"] for tag, attributes in tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    links = [value for _, attributes in tags for name, value in attributes.items() if name in ("src", "href", "action")]
    assert links == ["data:,"]


def test_names_cannot_inject_html(record):
    record["name"] = record["classes"][0] = record["source"]["name"] = HOSTILE
    record["recipe"]["method"]["name"] = record["definitions"]["last_accuracy"] = HOSTILE
    read = Read(render_run_page(record))
    assert not any(attributes.get("id") == "injected" for _, attributes in read.tags)
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert json.loads(read.record) == record


def test_a_run_of_one_task_in_closed_form(record):
    one = make_run(tasks=1) | {"evaluations": [], "epoch_losses": []}
    page = render_run_page(one)
    assert re.findall(r'<figure id="([\w-]+)"', page) == ["matrix", "by-stage", "calibration"]
    assert "lost" not in Read(page).text.split("Metrics of the whole run")[0]


def test_what_no_page_can_be_made_of(record, tmp_path):
    (tmp_path / "report.html").write_text("earlier")
    for wrong, message in (
        ({"schema": "forgetcast.record/2"}, "record/2'; expected"),
        ({"definitions": {}}, "without a definition"),
        ({"seconds": float("nan")}, "JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            write_run_report(record | wrong, tmp_path)
    with pytest.raises(ValueError, match=r"without \['stored_numbers'\]"):
        render_run_page({key: value for key, value in record.items() if key != "stored_numbers"})
    del record["per_class_accuracy"]
    with pytest.raises(ValueError, match=r"without \['per_class_accuracy'\]; expected .* Run the recipe again"):
        write_run_report(record, tmp_path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["earlier"]


@needs_browser
@pytest.mark.parametrize("width", [420, 1280])
def test_it_fits_the_screen_without_complaint(browser, page, tmp_path, width):
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    opened, complaints = open_page(browser, path, width, drawn="footer")
    for name in FIGURES:
        box = opened.locator(f"#{name} .chart svg").bounding_box()
        assert box is not None
        assert 300 < box["width"] < width
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []


def test_decisions_are_told(record):
    assert 'id="decisions"' not in render_run_page(record)
    record["decisions"] = [{"task": 1, "text": "task 1: 1 of 3 modules train, because x < y"}]
    assert "<li>task 1: 1 of 3 modules train, because x &lt; y</li>" in render_run_page(record)
