import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, at, needs_browser, open_page
from playwright.sync_api import Page

from forgetcast.report import figures
from forgetcast.report.page import FORMATS, flatten, render_page, summarise, write_report

FIGURES = ("by-task", "matrix", "by-class", "drift", "modes")


@pytest.fixture(scope="module")
def report(run_record, tmp_path_factory) -> Path:
    return write_report(run_record, tmp_path_factory.mktemp("report") / "made" / "here")


@pytest.fixture(scope="module")
def page(browser, report) -> Page:
    """The page of `run_record`, for tests that only read it."""
    return open_page(browser, report)[0]


def drop(item: dict[str, Any]) -> float:
    return item["accuracy_before"] - item["accuracy_forecast"]


@needs_browser
@pytest.mark.parametrize("width", [420, 1280])
def test_page_draws_every_figure_within_the_screen(browser, report, width):
    page, complaints = open_page(browser, report, width)
    for name in FIGURES:
        box = page.locator(f"#{name} .chart svg").bounding_box()
        assert box is not None
        assert box["width"] > 300
        assert box["height"] > 120
        assert page.eval_on_selector(f"#{name} .chart", "chart => chart.scrollWidth - chart.clientWidth") <= 1, name
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#by-class .mark-rect path").count() == 3 * 8
    assert page.locator("#drift .mark-symbol path").count() == 240
    assert complaints == []


@needs_browser
def test_classes_are_sorted_by_forecast_drop_and_tell_their_numbers(run_record, page):
    classes = run_record["tasks"][-1]["per_class"]
    labels = page.locator("#by-class .role-axis-label text").all_text_contents()
    expected = [str(item["class"]) for item in sorted(classes, key=drop, reverse=True)]
    assert [label for label in labels if "%" not in label] == expected

    page.locator("#by-class .mark-rect path").first.hover(position={"x": 5, "y": 12}, force=True)
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    text = tooltip.inner_text()
    assert str(classes[0]["class"]) in text
    for number in (drop(classes[0]), *(classes[0][f"accuracy_{when}"] for when in ("before", "forecast", "measured"))):
        assert f"{100 * number:.1f}%" in text


@needs_browser
def test_every_number_of_the_tables_is_the_record_s(run_record, page):
    cells = page.eval_on_selector_all(
        "[data-key]", "all => all.map(e => [e.dataset.key, e.dataset.value, e.textContent])"
    )
    kinds = {"accuracy_before": "share", "accuracy": "share", "energy": "share", "accuracy_error": "points"}
    kinds |= {"cosine": "cosine", "rank_correlation": "cosine", "one_minus_cosine": "tiny", "relative_error": "tiny"}
    for key, value, text in cells:
        number = at(run_record, key)
        kind = "metric" if key.startswith("metrics.") else kinds.get(key.rsplit(".", 1)[-1], "plain")
        assert json.loads(value) == number, key
        assert text == ("n/a" if number is None else FORMATS[kind](number)), key
    keys = {key for key, _, _ in cells}
    assert len(keys) == len(cells) == 13 * len(run_record["tasks"]) + len(run_record["metrics"]) + 6
    assert "n/a" in page.locator("#tasks").inner_text()
    for definition in run_record["definitions"].values():
        assert definition in page.locator("#metrics").inner_text()


@needs_browser
def test_headline_and_embedded_record(run_record, page):
    summary, headline = summarise(run_record), page.locator("h1").inner_text()
    assert f"fall by {100 * summary.forecast:.1f} points" in headline
    assert f"fallen by {100 * summary.measured:.1f} points" in headline
    assert json.loads(page.locator("#record").text_content() or "") == run_record


@needs_browser
def test_choosing_a_task_changes_the_figures_of_one_task(run_record, browser, report):
    page, complaints = open_page(browser, report)
    rank = run_record["tasks"][1]["vulnerable_rank"]["sample_modes"]
    page.locator(".picker span", has_text="Task 3").click()
    for name, text in {"drift": "Task 3:", "by-class": "Task 3:", "modes": f"vulnerable rank {rank}"}.items():
        page.wait_for_function(f"document.querySelector('#{name} svg').textContent.includes('{text}')")
    assert "90.0 % of the energy, eigenvalue order" in (page.locator("#modes svg").text_content() or "")
    assert page.locator("#by-class .mark-rect path").count() == 3 * 4
    assert complaints == []


@needs_browser
def test_names_cannot_inject_html(record, browser, tmp_path):
    record["name"] = record["source"]["name"] = HOSTILE
    record["tasks"][-1]["classes"][0] = HOSTILE
    record["tasks"][-1]["per_class"][0]["class"] = HOSTILE
    record["tasks"][-1]["vulnerable_rank"]["order"] = HOSTILE
    record["definitions"]["average_accuracy"] = HOSTILE
    path = tmp_path / "page.html"
    path.write_text(render_page(record), encoding="utf-8")
    page, complaints = open_page(browser, path)
    page.locator("#by-class .mark-rect path").first.hover(position={"x": 5, "y": 12}, force=True)
    page.locator("#vg-tooltip-element.visible").wait_for()
    assert page.locator("#injected").count() == 0
    assert page.title() == f"{HOSTILE} · forgetcast"
    assert json.loads(page.locator("#record").text_content() or "") == record
    assert complaints == []


def test_picture_and_page_are_written_whole(report):
    picture = report.with_name("report.png").read_bytes()
    width, height = (int.from_bytes(picture[start : start + 4]) for start in (16, 20))
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000
    assert 1500 < width < 3000
    assert 1500 < height < 4000
    assert sorted(file.name for file in report.parent.iterdir()) == ["report.html", "report.png"]


def test_failure_leaves_the_earlier_report(record, tmp_path):
    (tmp_path / "report.html").write_text("earlier")
    record["metrics"]["average_accuracy"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_report(record, tmp_path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["earlier"]


def test_charts_follow_the_vega_lite_schema(run_record):
    figures.overview(run_record).to_dict(validate=True)


def test_other_schema_raises(record):
    record["schema"] = "forgetcast.record/2"
    with pytest.raises(ValueError, match=r"record/2'; expected 'forgetcast.record/1'\. Write the record again"):
        render_page(record)


def test_metric_without_definition_raises(record):
    del record["definitions"]["first_minus_last"]
    with pytest.raises(ValueError, match=r"first_minus_last.*expected a definition"):
        render_page(record)


def test_record_of_no_task_raises(record):
    with pytest.raises(ValueError, match="at least one task after the first"):
        render_page({**record, "tasks": []})


def test_rise_of_accuracy_is_called_so(record):
    risen = deepcopy(record)
    for entry in risen["tasks"]:
        entry["measured"]["accuracy"] = entry["forecast"]["accuracy_before"] + 0.01
    assert "risen by 1.0 points" in render_page(risen)


def test_flatten_names_nested_settings():
    nested = {"training": {"steps": 3, "shape": [1, 2]}, "bias": True}
    assert list(flatten("recipe", nested)) == [
        ("recipe.training.steps", 3),
        ("recipe.training.shape", "1, 2"),
        ("recipe.bias", True),
    ]
