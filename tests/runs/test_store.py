"""Run directories: one recipe each, found again, listed even when damaged."""

import json

import pytest

from forgetcast.runs.recipe import build_recipe
from forgetcast.runs.record import SCHEMA, write_record
from forgetcast.runs.store import list_runs, open_run


def finish(folder, recipe, **metrics):
    record = {"schema": SCHEMA, "recipe": recipe.dump(), "seed": recipe.seed, "state": "finished", "metrics": metrics}
    write_record(record, folder)


def test_the_same_recipe_reopens_its_directory(tmp_path, recipe, tree):
    folder = open_run(tmp_path, recipe)
    assert folder == tmp_path / f"example-seed0-{recipe.hash.removeprefix('sha256:')[:8]}"
    assert (folder / "checkpoints").is_dir()
    (folder / "checkpoints" / "state").touch()
    assert open_run(tmp_path, build_recipe(tree | {"checkpoint": {"minutes": 1}})) == folder
    assert (folder / "checkpoints" / "state").exists()
    assert not list(folder.glob("*.part"))


def test_other_recipes_have_other_directories(tmp_path, recipe, tree):
    others = [{"seed": 1}, {"name": "other"}, {"training": {"epochs": 2}}]
    folders = {open_run(tmp_path, build_recipe(tree | other)) for other in others} | {open_run(tmp_path, recipe)}
    assert len(folders) == 4


def test_another_recipe_in_the_directory_is_refused(tmp_path, recipe):
    path = open_run(tmp_path, recipe) / "recipe.yaml"
    path.write_text(path.read_text().replace("epochs: 1", "epochs: 2"))
    with pytest.raises(ValueError, match="holds another recipe; expected the recipe sha256:.*Choose another root"):
        open_run(tmp_path, recipe)
    path.write_text("- 1")
    with pytest.raises(ValueError, match="recipe.yaml is a list; expected keys and values"):
        open_run(tmp_path, recipe)


def test_runs_are_listed_by_state(tmp_path, recipe, tree):
    finish(open_run(tmp_path, recipe), recipe, last_accuracy=0.5)
    second = build_recipe(tree | {"seed": 1})
    running = open_run(tmp_path, second)
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").touch()
    runs = list_runs(tmp_path)
    assert [(run.state, run.recipe["seed"]) for run in runs] == [("finished", 0), ("running", 1)]
    assert runs[0].record["metrics"] == {"last_accuracy": 0.5}
    assert [run.folder for run in list_runs(tmp_path, ["state=running"])] == [running]


def test_filters(tmp_path, tree):
    for seed in range(3):
        for epochs in (1, 2):
            recipe = build_recipe(tree | {"seed": seed, "training": {"epochs": epochs}})
            finish(open_run(tmp_path, recipe), recipe)
    assert len(list_runs(tmp_path, ["method.name=plain"])) == 6
    assert len(list_runs(tmp_path, ["training.epochs=2"])) == 3
    assert len(list_runs(tmp_path, ["training.epochs=2", "seed=1"])) == 1
    assert list_runs(tmp_path, ["method.name=closed"]) == []
    with pytest.raises(ValueError, match="no run has the key method.nmae; .*Did you mean 'method.name'"):
        list_runs(tmp_path, ["method.nmae=plain"])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"schema": "other/1"}',
        json.dumps({"schema": SCHEMA, "recipe": []}),
        json.dumps({"schema": SCHEMA, "metrics": 3}),
        b"\xff",
    ],
)
def test_damaged_records_are_listed_as_such(tmp_path, recipe, text):
    folder = open_run(tmp_path, recipe)
    (folder / "record.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for filters in ([], ["method.name=plain"], ["state=damaged"]):
        (run,) = list_runs(tmp_path, filters)
        assert (run.state, run.record, run.recipe) == ("damaged", {}, recipe.dump())
        assert "expected" in run.problem
    assert list_runs(tmp_path, ["method.name=closed"]) == []


def test_a_run_of_which_nothing_can_be_read_is_always_listed(tmp_path, recipe, tree):
    folder = open_run(tmp_path, recipe)
    (folder / "record.json").write_text("{")
    (folder / "recipe.yaml").write_text("a: [")
    open_run(tmp_path, build_recipe(tree | {"seed": 1}))
    assert [run.folder for run in list_runs(tmp_path, ["seed=5"])] == [folder]


def test_no_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no directory; expected the directory that holds the runs"):
        list_runs(tmp_path / "nowhere")
