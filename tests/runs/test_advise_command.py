"""`forgetcast advise`: what it says of each choice is held against the run that makes it."""

import json

import pytest
from test_forecast_command import recipe, type_in

from forgetcast.forecast.network import trust
from forgetcast.runs.advise import advise_recipe
from forgetcast.runs.execute import execute
from forgetcast.runs.recipe import build_recipe
from forgetcast.runs.record import read_record
from test_command_line_is_quick import HEAVIER, imported


def advice(recipe, root, **settings):
    return read_record(advise_recipe(recipe, root, **({"budget": 1.0} | settings)))


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """A recipe as a file, the root of its runs, and what the command printed and returned."""
    root = tmp_path_factory.mktemp("typed")
    (root / "small.yaml").write_text(json.dumps(recipe(5).dump()))
    words = ("--budget", "0.6", "--max-drop", "0.01", "--lengths", "0.5,1")
    return root, type_in("advise", root / "small.yaml", "--root", root, *words)


def test_the_command_tells_all_and_exits_with_4_where_nothing_is_within_the_limit(typed):
    root, done = typed
    assert done.exit_code == 4, done.output
    (path,) = root.glob("*/advice.json")
    record = read_record(path)
    points = record["points"]
    assert [(point["candidate"], point["length"]) for point in points] == [
        (name, length) for name in ("head", "all") for length in (0.5, 1.0)
    ]
    assert min(point["drop"] for point in points) > 0.01
    (best,) = [point for point in points if point["recommended"]]
    assert best["drop"] == min(point["drop"] for point in points)
    assert record["advice"]["share"] <= 0.6
    for words in (
        "task 1 of 2 (from 0)",
        "candidates: 2, forecast at",
        "nothing stays within a drop of 1.0 points",
        "what each choice is forecast to keep and to reach",
        "<- recommended",
        f"advice: {path}",
    ):
        assert words in done.output
    for point in points:
        assert f"{point['trained']:,}" in done.output
        assert f"{point['new_accuracy']:.1%}" in done.output


def test_the_page_is_drawn_from_the_record_alone(typed):
    root, _ = typed
    (page,) = root.glob("*/advice.html")
    first = page.read_text()
    page.unlink()
    done = type_in("report", page.with_suffix(".json"))
    assert done.output.strip() == f"report: {page}"
    assert page.read_text() == first
    record = read_record(page.with_suffix(".json"))
    assert first.count("<svg") == 1
    assert first.count("recommended</td>") == 1
    for point in record["points"]:
        assert f'data-value="{point["score"]}"' in first
    assert json.dumps(record["split_hash"]) in first
    free = record | {"settings": record["settings"] | {"max_drop": None}}
    page.with_suffix(".json").write_text(json.dumps(free))
    assert type_in("report", page.with_suffix(".json")).exit_code == 0
    assert "The limit" in first
    assert "The limit" not in page.read_text()
    page.with_suffix(".json").write_text(json.dumps({key: record[key] for key in record if key != "points"}))
    assert "without ['points']" in type_in("report", page.with_suffix(".json")).output


@pytest.mark.parametrize(
    ("method", "scenario"),
    [("sequential", "class_incremental"), ("sequential", "task_incremental"), ("joint", "task_incremental")],
)
def test_with_the_whole_budget_all_is_the_run(method, scenario, tmp_path):
    given = recipe(5, data={"scenario": scenario}, method={"name": method}, learning_rate=0.01)
    record = advice(given, tmp_path)
    real = read_record(execute(given, tmp_path))
    (point,) = [point for point in record["points"] if point["candidate"] == "all"]
    assert record["advice"]["accuracy_before"] == pytest.approx(real["accuracy_matrix"][0][0])
    assert point["old_accuracy"] == pytest.approx(real["accuracy_matrix"][1][0])
    assert point["trained"] == real["trainable_parameters"][1]
    assert point["score"] == pytest.approx((point["old_accuracy"] + point["new_accuracy"]) / 2, abs=0.02)  # smoothed
    assert record["advice"]["new_samples"] == 256


def test_validation_samples_are_read_where_there_are_some(tmp_path):
    record = advice(recipe(5, data={"validation_share": 0.2}), tmp_path, counts=(0,))
    assert 0 < record["advice"]["new_samples"] < 256


@pytest.mark.filterwarnings("ignore:.*directions free:UserWarning")
@pytest.mark.parametrize("method", [{"name": "sequential"}, {"name": "pegp", "threshold": 0.5}])
def test_modules_of_a_tuned_backbone(method, vit, pictures, tmp_path):
    tree = recipe(batch_size=5, epochs=1, learning_rate=0.001).dump()
    tree["method"] = method
    tree["data"] = {"source": f"folder:{pictures}", "increment": 2, "test_share": 0.25}
    tree["model"] = {"backbone": f"hf:{vit}", "tuner": {"kind": "adapter", "rank": 2}, "new_rows": "placed"}
    given = build_recipe(tree)
    record = advice(given, tmp_path)
    assert list(record["candidates"]) == ["head", "last 1", "all"]
    assert all(".1." in name for name in record["candidates"]["last 1"] if name[0] == "0")
    assert {name[0] for name in record["candidates"]["all"]} == {"0", "1"}
    real = read_record(execute(given, tmp_path))
    assert record["points"][-1]["old_accuracy"] == pytest.approx(real["accuracy_matrix"][1][0])


def test_other_exit_codes_and_options(typed, tmp_path, monkeypatch):
    root, _ = typed
    words = ["advise", root / "small.yaml", "--root", tmp_path, "--budget", "0.6"]
    done = type_in(*words, "--counts", "0", "--max-drop", "1")
    assert done.exit_code == 0
    assert "all" not in next(tmp_path.glob("*/advice.json")).read_text().split('"candidates"')[1].split("}")[0]
    assert type_in(*words, "--counts", "0,x").exit_code == 2
    for wrong, message in (
        (("--counts", "3"), "got a count of 3 modules; expected counts from 0 to 1"),
        (("--module", "block*"), "the pattern 'block*'"),
        (("--lengths", "2"), "got lengths=2.0"),
        (("--max-drop", "-1"), "got max_drop=-1.0"),
        (("--budget", "0.01"), "Raise budget"),
        (("method.name=ncm", "model.backbone=identity", "training={}"), "ncm takes no gradient step"),
    ):
        refused = type_in(*words, *wrong)
        assert (refused.exit_code, message in " ".join(refused.output.split())) == (1, True), refused.output
    monkeypatch.setattr(trust, "TRUSTED_COSINE", 1.01)
    doubted = type_in(*words, "--counts", "1")
    assert doubted.exit_code == 5
    assert "not to be trusted" in doubted.output


def test_help_imports_nothing_heavy_and_tells_the_exit_codes():
    printed, found = imported(["advise", "--help"], HEAVIER)
    assert found == "[]"
    for words in ("--max-drop", "Exits with 4", "with 5"):
        assert words in printed
