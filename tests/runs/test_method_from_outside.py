"""A method in a package of its own, which touches no file of this one: recipe, run, comparison, report."""

import importlib
import re
import sys
from textwrap import dedent

import pytest
from click.testing import CliRunner
from torch import nn

from forgetcast.cli import main
from forgetcast.methods.registry import METHODS, create, method_class
from forgetcast.methods.sequential import Sequential
from forgetcast.runs.begun import assembled, learn
from forgetcast.runs.execute import execute
from forgetcast.runs.recipe import load_recipe
from forgetcast.runs.record import read_record

CODE = '''
    """Fine-tuning that remembers the mean input of each task, and takes smaller steps the more cautious it is."""

    import torch

    from forgetcast.methods.base import Batch, Model, TaskData
    from forgetcast.methods.sequential import Sequential


    class Cautious(Sequential):
        """Args: caution: share of the loss that is left out."""

        def __init__(self, model: Model, *, caution: float = 0.5, layers: tuple[int, ...] = ()) -> None:
            super().__init__(model)
            self.caution = caution
            self.means: list[torch.Tensor] = []

        def loss(self, batch: Batch) -> torch.Tensor:
            return (1 - self.caution) * super().loss(batch)

        def end_task(self, task: TaskData) -> None:
            super().end_task(task)
            self.means.append(torch.full((100,), float(task.index)))

        def state_dict(self):
            return {**super().state_dict(), "means": list(self.means)}

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.means = list(state["means"])
'''
ENTRY_POINTS = """
    [forgetcast.methods]
    cautious = careful_methods:Cautious
    sequential = careful_methods:Cautious
    lost = careful_methods:Lost
    nowhere = no_such_module:Method
    number = careful_methods:torch
"""
RECIPE = """
    data: {source: digits, increment: 5}
    model: {backbone: "mlp:8"}
    training: {optimizer: sgd, learning_rate: 0.1, epochs: 2}
    method: {name: NAME}
"""
GROWTH = 5 * 9  # rows of the head for the five classes of a task


def type_in(*words):
    return CliRunner(env={"COLUMNS": "220"}).invoke(main, [str(word) for word in words])


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """A package as pip leaves it: a module, and beside it what says which methods are in it."""
    site = tmp_path / "site"
    about = site / "careful_methods-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "careful_methods.py").write_text(dedent(CODE))
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: careful-methods\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(dedent(ENTRY_POINTS))
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("careful_methods", None)


@pytest.fixture
def recipes(tmp_path):
    for name in ("cautious", "sequential"):
        (tmp_path / f"{name}_run.yaml").write_text(dedent(RECIPE).replace("NAME", name))
    return tmp_path


def run(recipes, name, *overrides):
    done = type_in("run", recipes / f"{name}_run.yaml", "--root", recipes / "runs", *overrides)
    assert done.exit_code == 0, done.output
    found = re.search(r"^run: (.*)$", done.output, re.MULTILINE)
    assert found is not None
    return done, recipes / "runs" / found[1].rpartition("/")[2]


def test_from_recipe_to_report(recipes):
    told, own = run(recipes, "cautious", "method.caution=0.9", "method.layers=[1, 2]")
    _, other = run(recipes, "sequential")
    record, plain = read_record(own), read_record(other)

    assert record["recipe"]["method"] == {"name": "cautious", "caution": 0.9, "layers": [1, 2]}
    assert record["stored_numbers"][1] - record["stored_numbers"][0] == 100 + GROWTH
    assert f"{record['stored_numbers'][1]:,} stored (+{100 + GROWTH})" in told.stderr
    assert record["metrics"]["learning_accuracy"] < plain["metrics"]["learning_accuracy"]

    compared = type_in("compare", own, other)
    lines = [line.split() for line in compared.output.splitlines()]
    for name, one, more in (("cautious_run", record, 100 + GROWTH), ("sequential_run", plain, GROWTH)):
        numbers = ["1", f"{one['metrics']['average_accuracy']:.4f}", "-"]
        assert [name, *numbers, f"{one['stored_numbers'][-1]:,}", f"+{more}"] in lines

    listed = type_in("runs", recipes / "runs", "method.name=cautious")
    assert "runs: 1" in " ".join(listed.output.split())
    assert f"{record['metrics']['last_accuracy']:.4f}" in listed.output

    (own / "report.html").unlink()
    assert type_in("report", own).exit_code == 0
    page = (own / "report.html").read_text()
    assert "<code>cautious</code>" in page
    for key, value in (("method.caution", "0.9"), ("method.layers", "1, 2")):
        assert re.search(rf'recipe\.{key}</th><td class="text"><code>(<[^>]*>)?{value}', page), key
    assert f"<td>+{100 + GROWTH}</td>" in page
    assert f"{100 * record['metrics']['last_accuracy']:.1f}" in page


def test_it_goes_on_where_it_stopped(recipes):
    whole = read_record(run(recipes, "cautious")[1])
    given = load_recipe(recipes / "cautious_run.yaml")
    learn(assembled(given, recipes / "cut", None), 1)  # the first of two tasks
    record = read_record(execute(given, recipes / "cut"))
    for key in ("accuracy_matrix", "stored_numbers", "weights_hash"):
        assert record[key] == whole[key]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method.cation=0.1",
            r"cautious has no option method.cation; expected one of \['caution', 'layers'\]. Did you",
        ),
        ("method.caution=much", "got method.caution='much'; expected a value of type float. Correct method.caution"),
        ("method.model=3", "no model, which the run gives"),
        ("method.name=cautios", "got method='cautios'; .*Did you mean 'cautious'"),
        ("method.name=lost", "cannot load method lost from careful_methods:Lost .*; expected module:Class"),
        ("method.name=nowhere", "cannot load method nowhere from no_such_module:Method .*Correct its entry point"),
        ("method.name=number", "careful_methods:torch is <module .*; expected a subclass of Method. .*method number"),
    ],
)
def test_what_is_wrong_is_said(recipes, override, message):
    done = type_in("run", recipes / "cautious_run.yaml", "--root", recipes / "runs", override)
    assert done.exit_code == 1
    assert re.search(f"^Error: .*{message}", done.output, re.MULTILINE), done.output
    assert not (recipes / "runs").exists()


def test_no_name_of_the_library_can_be_taken():
    assert method_class("sequential") is Sequential
    assert "cautious" not in METHODS


def test_in_python(recipes):
    made = create("cautious", nn.Flatten(), 64, caution=0.25)
    assert type(made).__name__ == "Cautious"
    assert made.caution == 0.25
