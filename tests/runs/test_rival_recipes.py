"""Recipes of rival methods: what was published and a dry run of each, and small ones that really run."""

import csv
import re
from collections.abc import Iterator

import pytest
from test_recipes_of_the_repository import RECIPES
from torch import Tensor

from forgetcast.learn.checkpoint import load_checkpoint
from forgetcast.methods.registry import method_class
from forgetcast.metrics.matrix import all_metrics
from forgetcast.runs.execute import execute
from forgetcast.runs.recipe import build_recipe, load_recipe
from forgetcast.runs.record import read_record

FOLDER = RECIPES / "rivals"
BY_TASK, BY_SAMPLE = ("last_accuracy", "average_accuracy"), ("last_sample_accuracy", "average_sample_accuracy")
# data, classes a task; optimiser, rate, epochs, batch; metrics, and the published last (and mean) accuracy in points
PUBLISHED = {
    "l2p": ("cifar100", 10, "adamw", 0.03 * 16 / 256, 5, 16, BY_TASK, (83.83,)),
    "dualprompt": ("cifar100", 10, "adamw", 0.03 * 24 / 256, 5, 24, BY_TASK, (86.51,)),
    "coda_prompt": ("cifar100", 10, "adamw", 1e-3, 20, 128, BY_TASK, (86.25,)),
    "inflora": ("cifar100", 10, "adamw", 5e-4, 20, 128, BY_TASK, (86.51, 91.70)),
    "sd_lora": ("imagenet_r", 20, "sgd", 0.01, 20, 128, BY_SAMPLE, (77.34, 82.04)),
    "ease": ("imagenet_r", 20, "sgd", 0.05, 20, 16, BY_SAMPLE, (76.17, 81.74)),
    "aper": ("cifar100", 5, "sgd", 0.01, 20, 48, BY_SAMPLE, (85.15, 90.65)),
    "lae": ("cifar100", 10, "adamw", 0.0028125, 5, 24, BY_TASK, (85.59,)),
    "ssiat": ("imagenet_r", 20, "sgd", 0.01, 10, 48, BY_SAMPLE, (79.38, 83.63)),
    "vpt_nsp2": ("cifar100", 10, "adamw", 0.01, 100, 256, BY_TASK, (91.74,)),
    "mos": ("imagenet_r", 20, "sgd", 0.05, 10, 16, BY_SAMPLE, (77.93, 82.96)),
}
WITHOUT_A_NUMBER = ("o_lora", "osf")
RIVALS = (*PUBLISHED, *WITHOUT_A_NUMBER)
# What a backbone of two blocks of width 16 has no room for, or a dry run no time.
ROOM = {
    "dualprompt": {"method.general_layers": [0], "method.expert_layers": [1]},
    "coda_prompt": {"method.layers": [0, 1]},
    "inflora": {"method.rank": 3, "method.tasks": 2},
    "lae": {"model.tuner.layers": [0, 1]},
    "ssiat": {"method.samples": 8},
    "mos": {"method.samples": 8, "method.epochs": 1},
}
BLOCKS, WIDTH = 2, 16


def adapters(rank: int) -> int:
    return BLOCKS * (2 * WIDTH * rank + WIDTH + rank)


def trained(name: str, task: int, classes: int, seen: int) -> int:
    """Numbers that train in a task of a dry run, by the method's own description."""
    rows = seen * (WIDTH + 1)
    return {
        "l2p": 10 * (5 + 1) * WIDTH + rows,
        "dualprompt": 2 * 5 * WIDTH + 2 * 5 * WIDTH + WIDTH + rows,
        "coda_prompt": BLOCKS * 10 * (2 * 4 + 2) * WIDTH + rows,
        "inflora": BLOCKS * 2 * 3 * WIDTH + rows,
        "sd_lora": BLOCKS * 2 * (10 * 2 * WIDTH + task + 1) + rows,
        "ease": adapters(64) + classes * WIDTH + 1,
        "aper": 0 if task else adapters(64) + rows,
        "lae": adapters(5) + rows,
        "ssiat": adapters(64) + seen * WIDTH,
        "vpt_nsp2": BLOCKS * 4 * WIDTH + rows,
        "mos": adapters(16) + rows,
        "o_lora": BLOCKS * 2 * 8 * 2 * WIDTH + rows,
        "osf": BLOCKS * (4 * (2 * WIDTH + 1) + 2 * (3 * WIDTH + 1)) * (WIDTH - (4, 8, 11, 11)[task]) + rows,
    }[name]


def tensors(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    for one in inner:
        yield from tensors(one)


def test_every_rival_has_a_recipe_with_its_settings_and_a_small_one():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {
        f"{name}{end}" for name in RIVALS for end in ("", "_small")
    }
    for name in RIVALS:
        large, small = (load_recipe(FOLDER / f"{name}{end}.yaml") for end in ("", "_small"))
        assert large.method.name == small.method.name == name
        assert build_recipe(large.dump()) == large
        paper = re.search(r"arXiv (\d{4}\.\d{5})", method_class(name).__doc__ or "")
        assert paper is not None
        for end in ("", "_small"):
            assert paper[0] in (FOLDER / f"{name}{end}.yaml").read_text().partition("data:")[0]
        assert (small.data.source, small.model.backbone) == ("digit_images", "vit")
        assert large.model.backbone.partition(":")[0] in ("hf", "timm")


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_say_what_was_published(name):
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    data, increment, *told, metrics, values = PUBLISHED[name]
    assert (recipe.data.source, recipe.data.increment) == (f"folder:{data}", increment)
    training = recipe.training
    assert [training.optimizer, training.learning_rate, training.epochs, training.batch_size] == told
    expected = {one.metric: (round(100 * one.value, 6), one.tolerance) for one in recipe.expected}
    assert expected == {metric: (value, 0.01) for metric, value in zip(metrics, values, strict=False)}
    for one, value in zip(recipe.expected, values, strict=True):
        assert f"{value:.2f}" in one.source


@pytest.mark.parametrize("name", WITHOUT_A_NUMBER)
def test_why_there_is_no_number(name):
    path = FOLDER / f"{name}.yaml"
    assert load_recipe(path).expected == ()
    assert "No number is expected" in path.read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_dry_run(name, drawn, vit, tmp_path):
    increment = PUBLISHED[name][1]
    few = {
        "data.source": f"folder:{drawn(2 * increment)}",
        "model.backbone": f"hf:{vit}",
        "preprocessing.size": 16,
        "training.epochs": 1,
        "training.batch_size": increment,
        **ROOM.get(name, {}),
    }
    recipe = load_recipe(FOLDER / f"{name}.yaml", [f"{key}={value}" for key, value in few.items()])
    record = read_record(execute(recipe, tmp_path))
    assert record["state"] == "finished"
    assert [event["run_step"] for event in record["epoch_losses"]] == ([2] if name == "aper" else [2, 4])
    assert record["trainable_parameters"] == [trained(name, task, increment, (task + 1) * increment) for task in (0, 1)]
    assert len(record["stored_numbers"]) == 2
    assert {one["metric"]: one["measured"] for one in record["expected"]} == {
        one.metric: record["metrics"][one.metric] for one in recipe.expected
    }
    evaluation = record["preprocessing"]["evaluation"]["steps"]
    resized = round(16 / (recipe.preprocessing.crop_share or 1))
    assert evaluation[:2] == [{"step": "Resize", "size": resized}, {"step": "CentreCrop", "size": 16}]
    assert [step["step"] for step in evaluation[2:]] == (["Normalise"] if recipe.preprocessing.normalise else [])


@pytest.mark.parametrize("name", WITHOUT_A_NUMBER)
def test_a_dry_run_on_texts(name, bert, tmp_path):
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    assert [len(classes) for classes in recipe.data.groups] == [14, 5, 10, 4]
    words = ["vote court judge", "sun rain cloud", "goal match team", "cat dog bird", "fish wind ball"]
    labels = [label for classes in recipe.data.groups for label in classes]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label", "split"])
        table.writerows(
            [f"the {words[index % 5]}", label, split]
            for index, label in enumerate(labels)
            for split in ("train", "test")
        )
    few = {
        "data.source.path": tmp_path / "table.csv",
        "model.backbone": f"hf:{bert}",
        "preprocessing.max_length": 12,
        "training.epochs": 1,
        "training.batch_size": 5,
    }
    given = load_recipe(FOLDER / f"{name}.yaml", [f"{key}={value}" for key, value in few.items()])
    record = read_record(execute(given, tmp_path))
    assert [event["run_step"] for event in record["epoch_losses"]] == [3, 4, 6, 7]
    assert [[record["classes"][output] for output in outputs] for outputs in record["task_classes"]] == [
        list(classes) for classes in recipe.data.groups
    ]
    seen = (14, 19, 29, 33)
    assert record["trainable_parameters"] == [trained(name, task, 0, seen[task]) for task in range(4)]
    assert record["accuracy_matrix"] == record["task_incremental_matrix"]


NEWEST_ALONE = all_metrics([[1.0 if j == t else 0.0 for j in range(t + 1)] for t in range(5)])["average_accuracy"]


@pytest.mark.parametrize("name", RIVALS)
def test_the_small_ones_learn_and_remember(name, tmp_path):
    """Better than a model that knows the newest task perfectly and nothing else, let alone than chance."""
    folder = execute(load_recipe(FOLDER / f"{name}_small.yaml"), tmp_path)
    record = read_record(folder)
    assert [one for one in record["expected"] if not one["holds"]] == []
    assert record["expected"]
    assert record["metrics"]["average_accuracy"] > NEWEST_ALONE
    assert all(0 <= value <= 1 for row in record["accuracy_matrix"] for value in row)
    assert [len(row) for row in record["accuracy_matrix"]] == [1, 2, 3, 4, 5]
    found = load_checkpoint(folder / "checkpoints", owner=None)
    assert found is not None
    held = list(tensors(found[1]["method"]))
    assert sum(tensor.numel() for tensor in held) == record["stored_numbers"][-1]
    assert all(tensor.isfinite().all() for tensor in held if tensor.dtype.is_floating_point)
    assert record["stored_numbers"] == sorted(record["stored_numbers"])


def test_the_page_lists_them():
    page = (RECIPES.parent / "docs" / "recipes.md").read_text()
    for name in RIVALS:
        (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        for value in PUBLISHED[name][-1] if name in PUBLISHED else ():
            assert f"{value:.2f}" in row
