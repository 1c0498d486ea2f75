"""A recipe becomes a run: every record complete, the same command goes on after an interruption."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from forgetcast.cli import main
from forgetcast.runs.data import stream_of
from forgetcast.runs.execute import execute
from forgetcast.runs.metrics_log import read_metrics
from forgetcast.runs.recipe import build_recipe
from forgetcast.runs.record import read_record

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(**method):
    return build_recipe(
        {
            "name": "small",
            "data": {"source": "digits", "increment": 4},
            "model": {"backbone": "mlp:16"},
            "method": {"name": "sequential"} | method,
            "training": {"epochs": 2, "learning_rate": 0.01},
        }
    )


def test_record_says_all_that_its_numbers_are(tmp_path):
    folder = execute(recipe(), tmp_path)
    record = read_record(folder)
    for key in (
        "seed",
        "class_order",
        "split_hash",
        "weights_hash",
        "versions",
        "recipe",
        "recipe_hash",
        "definitions",
    ):
        assert record[key] is not None
    assert record["state"] == "finished"
    assert [len(row) for row in record["accuracy_matrix"]] == [1, 2, 3]
    assert set(record["metrics"]) <= set(record["definitions"])
    events = read_metrics(folder / "metrics.jsonl")
    assert [event["event"] for event in events] == ["epoch", "epoch", "task"] * 3
    assert events[-1]["class_incremental_accuracy"] == record["accuracy_matrix"][-1]


def test_finished_run_is_not_run_again(tmp_path):
    first = read_record(execute(recipe(), tmp_path))
    again = read_record(execute(recipe(), tmp_path))
    for key in ("accuracy_matrix", "weights_hash", "split_hash", "metrics"):
        assert first[key] == again[key]
    log = next(tmp_path.glob("*/metrics.jsonl"))
    assert len(read_metrics(log)) == 9


def test_placed_rows_and_cosine_head(tmp_path):
    tree = recipe().dump()
    tree["model"] |= {"head": "cosine", "new_rows": "placed"}
    assert read_record(execute(build_recipe(tree), tmp_path))["metrics"]["learning_accuracy"] > 0.8


def test_the_command(tmp_path):
    runner = CliRunner()
    arguments = ["run", str(RECIPES / "digits_ranpac.yaml"), "--root", str(tmp_path), "--seeds", "0,1"]
    done = runner.invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert len(list(tmp_path.glob("*/record.json"))) == 2
    listed = runner.invoke(main, ["runs", str(tmp_path)])
    assert listed.exit_code == 0
    assert "ranpac" in listed.output
    wrong = runner.invoke(main, [*arguments, "trainig.epochs=3"])
    assert wrong.exit_code == 1
    assert "trainig" in wrong.output


def test_what_a_recipe_cannot_run(tmp_path):
    tree = recipe().dump()
    tree["model"]["backbone"] = "mlp:wide"
    with pytest.raises(ValueError, match=r"mlp:wide.*Give a width"):
        execute(build_recipe(tree), tmp_path)
    assert not any(json.loads(path.read_text()) for path in tmp_path.glob("*/record.json"))


def test_every_key_of_the_data_is_read(tmp_path):
    tree = recipe().dump()
    tree["data"] |= {"base": 6, "validation_share": 0.25, "scenario": "task_incremental", "online": True}
    tree["training"]["epochs"] = 1
    stream = stream_of(build_recipe(tree).data, 0)
    assert [len(task.classes) for task in stream.tasks] == [6, 4]
    assert all(len(task.validation) > 0 for task in stream.tasks)
    record = read_record(execute(build_recipe(tree), tmp_path))
    assert record["accuracy_matrix"] == record["task_incremental_matrix"] != record["class_incremental_matrix"]
