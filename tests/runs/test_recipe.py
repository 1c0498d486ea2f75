"""Recipes: what is unknown, unread or impossible is an error; what is valid survives a round trip."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from forgetcast.learn.optimizer import Optimization
from forgetcast.runs.recipe import Training, build_recipe, load_recipe

FILE = """
data: {source: digits, increment: 2}
method: {name: plain, strength: 0.5}
training: {optimizer: sgd, learning_rate: 1e-2, momentum: 0.9}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plain_digits.yaml"
    path.write_text(FILE)
    return path


def test_file_and_overrides(file):
    overrides = ["training.epochs=3", "data.class_order=[2, 0, 1]", "method.ranks=[4]", "checkpoint.keep=5", "seed=7"]
    recipe = load_recipe(file, overrides)
    assert recipe.name == "plain_digits"
    assert (recipe.training.learning_rate, recipe.training.epochs, recipe.training.batch_size) == (0.01, 3, 64)
    assert recipe.data.class_order == (2, 0, 1)
    assert recipe.method.options == {"strength": 0.5, "ranks": [4]}
    assert (recipe.checkpoint.keep, recipe.seed) == (5, 7)


def test_an_override_wins_over_the_file(file):
    assert load_recipe(file, ["training.momentum=0.5"]).training.momentum == 0.5
    assert load_recipe(file, ["name=other"]).name == "other"


def test_round_trip(file):
    recipe = load_recipe(file, ["data.class_order=[1, 0]"])
    plain = json.loads(json.dumps(recipe.dump()))
    assert plain == recipe.dump()
    assert build_recipe(plain) == recipe
    assert build_recipe(plain).hash == recipe.hash


def test_hash_is_of_what_decides_the_numbers(file):
    same = ["name=other", "checkpoint.minutes=1", "training.learning_rate=0.01", "training.epochs=1"]
    assert {load_recipe(file, [override]).hash for override in same} == {load_recipe(file).hash}
    others = ["seed=1", "training.epochs=2", "method.strength=0.25", "data.increment=1", "training.learning_rate=1"]
    assert len({load_recipe(file, [override]).hash for override in others} | {load_recipe(file).hash}) == 6


def test_recipes_do_not_change(recipe):
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.epochs = 2


def test_training_is_what_the_loop_takes():
    assert Optimization(**Training().optimization) == Optimization()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", "nothing reads the key training.epoch; .*Did you mean 'training.epochs'"),
        ("trainig.epochs=3", "nothing reads the key trainig; .*Did you mean 'training'"),
        ("batch_size=3", "nothing reads the key batch_size; .*Did you mean 'training.batch_size'"),
        ("model.batch_size=3", "nothing reads the key model.batch_size; .*Did you mean 'training.batch_size'"),
        ("method.strenght=1", "plain has no option method.strenght; .*'strength'.*Did you mean 'method.strength'"),
        ("method.seed=1", "got method.seed=1; expected no seed, which the run gives. Leave"),
        ("method.name=plian", "got method='plian'; .*Did you mean 'plain'"),
        ("training.optimizer=sdg", "got training.optimizer='sdg'; expected 'sgd' or 'adamw'. Did you mean 'sgd'"),
        ("training.epochs=2.0", "got training.epochs=2.0; expected a valid integer. Correct training.epochs"),
        ("training.epochs=true", "got training.epochs=True; expected a valid integer"),
        ("training.epochs='2'", "got training.epochs='2'; expected a valid integer"),
        ("training.epochs=0", "got training.epochs=0; expected greater than or equal to 1"),
        ("training.learning_rate=0", "got training.learning_rate=0; expected greater than 0"),
        ("data.online=1", "got data.online=1; expected a valid boolean"),
        ("data.class_order=[0, a]", "got data.class_order.1='a'; expected a valid integer"),
        ("data.class_order=[0, 0]", r"got data.class_order=\[0, 0\]; expected each label once"),
        ("data.source=3", "got data.source=3; expected digits, an address"),
        ("data=3", "got data=3; expected"),
        ("data.source.name=digits", "data.source.name='digits', and source is no section; expected a key"),
        ("method.strength=much", "got method.strength='much'; expected a value of type float. Correct"),
        ("method.strength=true", "got method.strength=True; expected a value of type float"),
        ("method.ranks=[1.5]", "got method.ranks=.*; expected a value of type tuple"),
        ("method.name=closed", "closed has no option method.strength"),
        ("method={name: closed}", "no method.size; expected a value, which closed has no default for. Add method.size"),
        ("training.optimizer=adamw", "got training.momentum=0.9; expected no momentum, because adamw .*Leave"),
        ("data.scenario=domain_incremental", "got data.increment=2; expected no increment, because domain.*Leave"),
        ("data.increment=null", "no data.increment; expected the new classes a task .*Add data.increment"),
        ("data={source: digits, scenario: domain_incremental, base: 2}", "got data.base=2; expected no base"),
        ("data={increment: 2}", "no data.source; expected a value.*Add data.source"),
        ("data={source: digits, increment: 2, test_share: 0.5, validation_share: 0.5}", "expected a sum below 1"),
        ("name=../up", "got name='../up'; expected letters"),
        ("seed=-1", "got seed=-1; expected greater than or equal to 0"),
        ("checkpoint.keep=0", "got checkpoint.keep=0; expected"),
        ("checkpoint", "got 'checkpoint'; expected key=value"),
    ],
)
def test_refused(file, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(file, [override])


def test_an_online_stream_is_seen_once(file):
    assert load_recipe(file, ["data.online=true"]).data.online
    with pytest.raises(ValueError, match="got training.epochs=2 with data.online=true; expected one epoch.*Leave"):
        load_recipe(file, ["data.online=true", "training.epochs=2"])


def test_a_closed_form_reads_the_batch_size_alone(file):
    method = "method={name: closed, size: 3}"
    assert load_recipe(file, [method, "training={batch_size: 8}"]).training.batch_size == 8
    with pytest.raises(ValueError, match="got training.epochs=2; expected no epochs, because closed is a closed form"):
        load_recipe(file, [method, "training={epochs: 2}"])
    with pytest.raises(ValueError, match="got model.head='cosine'; expected no head, because closed brings its own"):
        load_recipe(file, [method, "training={}", "model.head=cosine"])


def test_an_override_given_twice_is_refused(file):
    with pytest.raises(ValueError, match="got seed twice in the overrides; expected each key once"):
        load_recipe(file, ["seed=1", "seed=2"])


@pytest.mark.parametrize("text", ["", "- 1", "digits"])
def test_a_file_without_sections_is_refused(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"bad.yaml holds a .*; expected the sections \['name', 'data'"):
        load_recipe(tmp_path / "bad.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*nowhere.yaml .*; expected a recipe in YAML"):
        load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_of_the_repository_are_valid(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert build_recipe(recipe.dump()) == recipe
