"""`forgetcast forecast`: what it says before training is held against the same recipe run for real."""

import json
from dataclasses import replace
from statistics import median

import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner
from torch import nn
from torch.nn.functional import cross_entropy

import forgetcast as fc
from forgetcast.cli import main
from forgetcast.forecast.network import trust
from forgetcast.forecast.result import share_right
from forgetcast.learn.checkpoint import checkpoints
from forgetcast.methods.base import Batch, TaskData
from forgetcast.methods.registry import METHODS, create, method_class, needs_blocks, needs_tuner
from forgetcast.runs.assembly import assemble
from forgetcast.runs.execute import execute
from forgetcast.runs.forecast import forecast_recipe
from forgetcast.runs.frontier import frontier, within
from forgetcast.runs.recipe import build_recipe
from forgetcast.runs.record import read_record
from forgetcast.runs.upcoming import upcoming
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.anatomy import Anatomy, Block
from test_command_line_is_quick import HEAVIER, imported

TIMES = ("seconds", "created")


def recipe(increment=4, method=None, seed=0, data=None, model=None, **training):
    training = {"epochs": 2, "batch_size": 30, "learning_rate": 0.003} | training
    return build_recipe(
        {
            "name": "small",
            "data": {"source": "digits", "increment": increment} | (data or {}),
            "model": {"backbone": "mlp:16"} | (model or {}),
            "method": {"name": "sequential"} | (method or {}),
            "training": training,
            "seed": seed,
        }
    )


def forecast(recipe, root, **settings):
    return read_record(forecast_recipe(recipe, root, **({"budget": 0.5} | settings)))


def type_in(*words):
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(word) for word in words])


def without_times(record):
    kept = {key: value for key, value in record.items() if key not in TIMES}
    return kept | {"forecast": {key: value for key, value in record["forecast"].items() if key not in TIMES}}


REPLAYED = {
    "AdamW, cosine, decay": recipe(schedule="cosine", weight_decay=0.1),
    "SGD, momentum, clipped, placed rows": recipe(
        model={"new_rows": "placed"}, optimizer="sgd", learning_rate=0.05, momentum=0.9, max_gradient_norm=0.5
    ),
    "loss of the task's outputs": recipe(method={"loss_outputs": "task"}, weight_decay=0.1),
    "joint": recipe(method={"name": "joint"}, schedule="cosine"),
    "cosine head": recipe(model={"head": "cosine", "new_rows": "placed"}),
    "frozen features": recipe(model={"backbone": "identity"}, schedule="cosine", weight_decay=0.1),
}


@pytest.mark.parametrize("case", REPLAYED)
def test_with_the_whole_budget_the_forecast_is_what_the_loop_does(case, tmp_path):
    record = forecast(REPLAYED[case], tmp_path, budget=1.0, verify=True)
    known = record["calibration"]
    assert record["steps"] == 2 * -(-record["new_samples"] // 30)
    assert record["new_samples"] % 30 != 0  # so that the last batch of an epoch is short
    assert known["one_minus_cosine"] < 1e-9
    assert known["relative_error"] < 1e-4
    assert abs(known["accuracy_error"]) <= 1 / record["old_samples"]
    assert record["forecast"]["trusted"]
    assert record["left_out"] == []


def test_half_the_budget_forecasts_what_is_measured_on_most_seeds(tmp_path):
    cosines = []
    for seed in range(3):
        record = forecast(recipe(5, seed=seed), tmp_path, verify=True)
        assert record["forecast"]["estimator"] == "anchored"
        assert record["forecast"]["share_of_run"] <= 0.5
        cosines.append(record["calibration"]["cosine"])
    assert median(cosines) > 0.8


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental"])
def test_accuracies_are_those_of_the_run(scenario, tmp_path):
    given = recipe(data={"scenario": scenario}, learning_rate=0.01)
    record = forecast(given, tmp_path, task=2, verify=True)
    real = read_record(execute(given, tmp_path))
    assert [row["accuracy_before"] for row in record["per_task"]] == pytest.approx(real["accuracy_matrix"][1])
    assert [row["accuracy_measured"] for row in record["per_task"]] == pytest.approx(real["accuracy_matrix"][2][:2])
    for row in record["per_class"]:
        assert row["accuracy_measured"] == pytest.approx(real["per_class_accuracy"][2][row["output"]])
    points = record["frontier"]
    assert [points[0]["drop"], points[0]["old_accuracy"]] == [0.0, record["forecast"]["accuracy_before"]]
    assert points[-1]["steps"] == record["steps"]
    assert points[-1]["old_accuracy"] == pytest.approx(record["forecast"]["accuracy"])


def test_a_point_of_the_frontier_is_the_forecast_of_that_shorter_training(tmp_path):
    given = recipe(model={"backbone": "identity"}, learning_rate=0.01, schedule="cosine")
    made = assemble(given, tmp_path, Accelerator())
    made.learn(until=1)
    task = upcoming(made, 1, 1000)
    inputs, labels = task.new
    whole = fc.forecast(task.model, task.old, task.new, task.training)
    points = frontier(whole, task, 1.0)
    assert points[-1].steps == task.training.steps
    for point in points[1::6]:
        k = point.steps
        rates, order = task.training.learning_rate[:k], task.training.order[:k]
        shorter = replace(task.training, steps=k, learning_rate=rates, order=order)
        alone = fc.forecast(task.model, task.old, task.new, shorter)
        near_tie = 1.5 / len(labels)  # one may fall either way
        assert point.old_accuracy == pytest.approx(alone.accuracy, abs=near_tie)
        assert point.drop == pytest.approx(1.0 - point.old_accuracy)
        logits = inputs.flatten(1) @ alone.end.weight.T + alone.end.bias
        assert point.new_accuracy == pytest.approx(share_right(logits, labels), abs=near_tie)
    best = within(points, 0.1)
    passed = [point.steps for point in points if point.drop > 0.1]
    assert 0 < best.steps < min(passed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The root and record of a finished run of three tasks."""
    root = tmp_path_factory.mktemp("finished")
    return root, read_record(execute(recipe(), root))


def test_from_a_checkpoint_it_is_the_same_as_from_nothing(finished, tmp_path):
    root, _ = finished
    scratch = forecast(recipe(), tmp_path, task=2)
    resumed = forecast(recipe(), root)  # of a finished run the last task, from the checkpoint before it
    again = forecast(recipe(), tmp_path)
    assert without_times(scratch) == without_times(resumed) == without_times(again)
    assert scratch["task"] == 2


def test_the_run_goes_on_as_if_nothing_had_been_forecast(finished, tmp_path):
    _, whole = finished
    assert forecast(recipe(), tmp_path)["task"] == 1
    assert forecast(recipe(), tmp_path, verify=True)["task"] == 1
    assert forecast(recipe(), tmp_path)["task"] == 2
    done = read_record(execute(recipe(), tmp_path))
    for key in ("weights_hash", "accuracy_matrix", "metrics"):
        assert done[key] == whole[key]


def test_a_run_that_has_passed_the_task_is_left_alone(finished):
    root, whole = finished
    saved = checkpoints(next(root.glob("small-*")) / "checkpoints")
    with pytest.raises(ValueError, match=r"passed the end of task 0 .* expected a checkpoint .* Choose another root"):
        forecast_recipe(recipe(), root, task=1)
    assert checkpoints(saved[0].parent) == saved
    assert read_record(execute(recipe(), root))["weights_hash"] == whole["weights_hash"]


def test_protections_are_named_as_left_out(tmp_path):
    record = forecast(recipe(5, method={"name": "lwf", "strength": 5.0}), tmp_path, budget=1.0, verify=True)
    (left_out,) = record["left_out"]
    assert "Distillation of lwf" in left_out
    plain = forecast(recipe(5, method={"loss_outputs": "task"}), tmp_path, budget=1.0)
    assert record["per_class"][0]["accuracy_forecast"] == plain["per_class"][0]["accuracy_forecast"]
    assert record["calibration"]["cosine"] < 0.999  # the protection did something


def test_what_else_acts_in_the_steps_of_a_pretrained_backbone_is_left_out(vit, bert, pictures, texts, tmp_path):
    def of(source, folder, trainable, preprocessing, **settings):
        data = {"source": source, "increment": 2, "test_share": 0.25}
        model = {"backbone": f"hf:{folder}", "trainable": trainable}
        tree = recipe(batch_size=5, learning_rate=0.001).dump()
        tree |= {"data": data, "model": model, "preprocessing": preprocessing}
        return forecast(build_recipe(tree), tmp_path, budget=1.0, **settings)

    images, news = f"folder:{pictures}", f"csv:{texts / 'news.csv'}?text=said&label=topic"
    plain = of(images, vit, ["layers.1.*"], {}, verify=True)
    assert (plain["left_out"], plain["forecast"]["estimator"]) == ([], "anchored")
    assert plain["calibration"]["one_minus_cosine"] < 1e-5
    (flips,) = of(images, vit, "all", {"flip": 0.5})["left_out"]
    assert flips.startswith("random crops and flips")
    (dropout,) = of(news, bert, "all", {"max_length": 16})["left_out"]
    assert dropout.startswith("dropout")
    frozen = of(news, bert, "none", {"max_length": 16}, verify=True)
    assert (frozen["left_out"], frozen["forecast"]["estimator"]) == ([], "linear")
    assert frozen["calibration"]["one_minus_cosine"] < 1e-5


BY_GRADIENT = [name for name in METHODS if method_class(name).by_gradient and not needs_blocks(name)]


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_methods_say_rightly_what_their_plain_loss_is(name):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    if needs_tuner(name):
        backbone.append(nn.Linear(5, 5))
        Adapter(rank=4).attach(backbone, Anatomy((Block("", "0", "2"),)))
    method = create(name, backbone, 5)
    draw = torch.Generator().manual_seed(1)
    for index, classes in enumerate([(0, 1), (2, 3)]):
        labels = torch.randint(classes[0], classes[1] + 1, (12,), generator=draw)
        batch = Batch(torch.randn(12, 6, generator=draw), labels, torch.arange(12))
        method.begin_task(TaskData(index, classes, tuple(range(classes[1] + 1)), lambda batch=batch: iter([batch])))
        outputs = method.plain_outputs()
        if outputs is None:
            continue
        nn.init.normal_(method.model.head.weight, generator=draw)
        steps = [protection for protection in method.protections if protection.acts_on_steps]
        method.protections = tuple(set(method.protections) - set(steps))
        logits = method.model(batch.inputs)[:, list(outputs)]
        expected = cross_entropy(logits, labels - outputs[0])
        torch.testing.assert_close(method.loss(batch), expected)
        assert "params" in method.parameter_groups()[0]
        assert len(method.parameter_groups()) == 1


def test_old_samples_are_taken_evenly(tmp_path):
    given = recipe(model={"backbone": "identity"})
    whole = forecast(given, tmp_path, task=2)
    few = forecast(given, tmp_path, task=2, most_old=60)
    assert few["old_samples"] == 60
    total = whole["old_samples"]
    for kind in ("per_class", "per_task"):
        for row, all_of_it in zip(few[kind], whole[kind], strict=True):
            assert abs(row["samples"] - 60 * all_of_it["samples"] / total) <= 1


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """A recipe as a file, the root of its runs, and what the command printed and returned."""
    root = tmp_path_factory.mktemp("typed")
    (root / "small.yaml").write_text(json.dumps(recipe().dump()))
    words = ("--budget", "0.5", "--verify", "--diagnose")
    return root, type_in("forecast", root / "small.yaml", "--root", root, *words)


def test_the_command_tells_all_and_exits_with_4_past_the_limit(typed):
    root, done = typed
    assert done.exit_code == 4, done.output
    (path,) = root.glob("*/forecast.json")
    record = read_record(path)
    assert record["forecast"]["drop"] > 0.02
    for words in (
        "task 1 of 3 (from 0)",
        "expected cosine",
        "of the run's cost",
        "points, above 2.0",
        f"within 2.0 points: {record['safe']['steps']} of {record['steps']} steps",
        "measured: old accuracy",
        "accuracy of each old task",
        "the 5 old classes that fall most",
        "what a shorter training buys",
        "the layers that carry most of the forecast drift",
        "energy of the drift by direction",
        f"forecast: {path}",
    ):
        assert words in done.output
    assert record["safe"]["drop"] <= 0.02
    worst = max(record["per_class"], key=lambda row: row["accuracy_before"] - row["accuracy_forecast"])
    assert done.output.index("fall most") < done.output.index(f"\n{worst['class']} ", done.output.index("fall most"))


def test_diagnostics_of_the_record(typed):
    root, _ = typed
    found = read_record(next(root.glob("*/forecast.json")))["diagnostics"]
    assert [row["layer"] for row in found["layers"]] == ["0.1", "1"]
    whole = {row["layer"]: row for row in found["layers"]}
    assert whole["0.1"]["parameters"] == 64 * 16 + 16
    assert 0 < whole["1"]["share"] < 1.5
    assert found["kernel"]["change"] > 0
    for way in ("measured", "predicted"):
        assert 0.95 < sum(row[way] for row in found["directions"]) < 1 + 1e-9
    assert len(found["directions"][0]["classes"]) == 2


def test_other_exit_codes(typed, tmp_path, monkeypatch):
    root, _ = typed
    words = ["forecast", root / "small.yaml", "--root", tmp_path, "--budget", "0.5"]
    assert type_in(*words, "--max-drop", "1").exit_code == 0
    wrong = type_in(*words, "trainig.epochs=3")
    assert (wrong.exit_code, "trainig" in wrong.output) == (1, True)
    assert type_in(*words, "--task", "3").exit_code == 1
    monkeypatch.setattr(trust, "TRUSTED_COSINE", 1.01)
    doubted = type_in(*words, "--max-drop", "1")
    assert doubted.exit_code == 5
    assert "not to be trusted" in doubted.output


@pytest.mark.parametrize(
    ("method", "message"),
    [("ncm", "ncm takes no gradient step in task 1"), ("icarl", "Add method.name=sequential")],
)
def test_methods_that_cannot_be_forecast_are_refused_before_anything_trains(method, message, typed, tmp_path):
    root, _ = typed
    keys = ["model.backbone=identity", "training={batch_size: 32}"]
    done = type_in("forecast", root / "small.yaml", f"method={{name: {method}}}", *keys, "--root", tmp_path)
    assert done.exit_code == 1
    assert message in done.output
    assert not list(tmp_path.glob("*/checkpoints/0*"))


def test_a_budget_that_pays_for_nothing_says_what_would_do(typed, tmp_path):
    root, _ = typed
    done = type_in("forecast", root / "small.yaml", "--root", tmp_path, "--budget", "0.001")
    assert done.exit_code == 1
    assert "Raise budget" in done.output


def test_the_page_is_drawn_from_the_record_alone(typed):
    root, _ = typed
    (page,) = root.glob("*/forecast.html")
    first = page.read_text()
    page.unlink()
    done = type_in("report", page.with_suffix(".json"))
    assert done.output.strip() == f"report: {page}"
    assert page.read_text() == first
    record = read_record(page.with_suffix(".json"))
    assert first.count("<svg") == 2
    assert f'data-value="{record["diagnostics"]["layers"][0]["share"]}"' in first
    assert "Energy of the drift by direction" in first
    assert json.dumps(record["split_hash"]) in first
    assert f'data-value="{record["forecast"]["drop"]}"' in first
    measured = dict(record, calibration=None, diagnostics=None)
    page.with_suffix(".json").write_text(json.dumps(measured))
    assert type_in("report", page.with_suffix(".json")).exit_code == 0
    assert "broken precision" not in page.read_text()


def test_help_imports_nothing_heavy_and_tells_the_exit_codes():
    printed, found = imported(["forecast", "--help"], HEAVIER)
    assert found == "[]"
    for words in ("--max-drop", "Exits with 4", "with 5"):
        assert words in printed
