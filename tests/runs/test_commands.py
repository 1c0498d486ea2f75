"""`forgetcast runs` and `forgetcast compare`, as a person types them."""

import pytest
from click.testing import CliRunner

from forgetcast.cli import main
from forgetcast.metrics.matrix import all_metrics
from forgetcast.runs.recipe import build_recipe
from forgetcast.runs.record import provenance, write_record
from forgetcast.runs.store import open_run


def type_in(*words):
    return CliRunner(env={"COLUMNS": "220"}).invoke(main, [str(word) for word in words])


@pytest.fixture
def folders(tmp_path, tree, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    for epochs, gain in ((1, 0.0), (2, 0.125)):
        for seed in range(3):
            recipe = build_recipe(tree | {"seed": seed, "training": {"epochs": epochs}})
            matrix = [[1.0, None], [0.5 + gain, 0.75]]
            folder = open_run(tmp_path / "runs", recipe)
            write_record(
                provenance()
                | {"recipe": recipe.dump(), "seed": seed, "state": "finished"}
                | {"accuracy_matrix": matrix, "metrics": all_metrics(matrix)},
                folder,
            )
            folders.append(folder)
    return folders


def test_runs_lists_method_seed_metrics_and_state(folders):
    result = type_in("runs")
    assert result.exit_code == 0
    assert [folders[0].name, "plain", "0", "0.8125", "0.6250", "0.5000", "finished"] in [
        line.split() for line in result.output.splitlines()
    ]


def test_runs_takes_filters_with_and_without_a_root(folders):
    for words in (["training.epochs=2", "seed=1"], ["runs", "training.epochs=2", "seed=1"]):
        result = type_in("runs", *words)
        assert "runs in runs: 1" in result.output
        assert folders[4].name in result.output


def test_runs_tells_what_is_damaged(folders):
    (folders[0] / "record.json").write_text("{")
    result = type_in("runs")
    assert result.exit_code == 0
    assert "damaged" in result.stdout
    assert folders[0].name in result.stderr
    assert "cannot read the record" in result.stderr


def test_compare_shows_spreads_and_differences(folders):
    result = type_in("compare", *folders, "--metric", "last_accuracy")
    assert result.exit_code == 0
    for words in ("example (training.epochs=1)", "0.6250", "0.6875", "+0.0625", "3 / 0 / 0", "higher is better"):
        assert words in result.output
    assert "last_accuracy: Mean accuracy over all tasks after the last one." in result.output


def test_errors_are_told_without_a_traceback(folders, tmp_path):
    for words, message in (
        (["runs", "nowhere"], "nowhere is no directory"),
        (["compare", folders[0]], "records of 1 recipes"),
        (["compare", folders[0], tmp_path / "nowhere"], "cannot read the record"),
        (["compare", *folders, "--metric", "last_acuracy"], "Did you mean 'last_accuracy'"),
    ):
        result = type_in(*words)
        assert result.exit_code == 1
        assert result.output.startswith("Error: ")
        assert message in result.output
