"""The nine recipes of NTK-CL's paper: its numbers in them, and a dry run of each with drawn images and a tiny ViT."""

import re
import shlex
import sys
from types import ModuleType

import pytest
import torch
from test_recipes_of_the_repository import RECIPES
from torch import Tensor, nn

from forgetcast.runs.execute import execute
from forgetcast.runs.recipe import build_recipe, load_recipe
from forgetcast.runs.record import read_record

# classes, base, increment, rate, batch, epochs, decay, pretrained pass, contrast; mean and last accuracy, in points, of
# the weights of ImageNet-21k and of those fine-tuned on ImageNet-1k: arXiv 2407.17120, Tables 2 to 5, and its code
PUBLISHED = {
    "cifar100": (100, 10, 10, 0.025, 16, 20, 5e-4, False, 0.03, 93.76, 90.27, 93.16, 89.43),
    "imagenet_r": (200, 20, 20, 0.02, 16, 20, 5e-3, False, 0.2, 82.77, 77.17, 83.18, 77.76),
    "imagenet_a": (200, 20, 20, 0.02, 16, 20, 5e-3, False, 0.2, 66.56, 58.54, 68.76, 60.58),
    "domainnet": (345, 23, 23, 0.02, 96, 50, 5e-3, False, 0.2, 73.70, 67.44, 72.94, 66.73),
    "oxford_pets": (37, 7, 5, 0.02, 96, 5, 5e-3, True, 0.2, 96.69, 94.11, 96.62, 94.28),
    "eurosat": (10, 2, 2, 1e-4, 96, 5, 5e-3, True, 0.2, 87.63, 79.84, 88.50, 80.94),
    "plantvillage": (15, 3, 3, 5e-3, 96, 5, 5e-3, True, 0.2, 88.00, 81.88, 87.26, 80.81),
    "vtab": (50, 10, 10, 0.03, 96, 45, 5e-3, True, 0.2, 89.67, 85.53, 88.48, 83.47),
    "kvasir": (8, 2, 2, 5e-3, 96, 5, 5e-3, True, 0.2, 90.03, 82.7, 91.88, 84.72),
}
TASKS = 2


def path_of(name):
    return RECIPES / "ntk_cl" / f"{name}.yaml"


def short(name, drawn):
    """Overrides for two batches of each of two tasks, with images that a tiny backbone takes."""
    base, increment = PUBLISHED[name][1:3]
    few = {
        "data.source": f"folder:{drawn(base + increment)}",
        "preprocessing.size": 16,
        "method.tasks": TASKS,
        "training.epochs": 1,
        "training.batch_size": base,
    }
    return [f"{key}={value}" for key, value in few.items()]


def test_there_is_a_recipe_for_each_data_set():
    assert {path.stem for path in (RECIPES / "ntk_cl").glob("*.yaml")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_say_what_was_published(name):
    recipe = load_recipe(path_of(name))
    assert build_recipe(recipe.dump()) == recipe
    assert (recipe.name, recipe.data.source) == (f"ntk_cl_{name}", f"folder:{name}")
    classes, base, increment, *told, mean, last, _, _ = PUBLISHED[name]
    data, training, options = recipe.data, recipe.training, recipe.method.options
    assert (data.base, data.increment) == (base, increment)
    assert options["tasks"] == 1 + -(-(classes - base) // increment)
    passes = (options["pretrained"], options["contrast"])
    assert [training.learning_rate, training.batch_size, training.epochs, training.weight_decay, *passes] == told
    weights = [1.0, 0.3, 0.1] if options["pretrained"] else [0.3, 0.1]
    fixed = {"recipe": "released", "prompts": 10, "rank": 16, "section_weights": weights, "drift": 1e-3}
    assert {key: options[key] for key in fixed} == fixed
    assert (training.optimizer, training.momentum, training.schedule) == ("sgd", 0.9, "cosine_by_epoch")
    expected = {one.metric: (round(100 * one.value, 6), one.tolerance) for one in recipe.expected}
    assert expected == {"average_sample_accuracy": (mean, 0.01), "last_sample_accuracy": (last, 0.01)}
    table = 2 if name in ("cifar100", "imagenet_r", "imagenet_a") else 4
    for one, value in zip(recipe.expected, (mean, last), strict=True):
        place, told_value = re.search(r"2407.17120, Table (\d), ([\d.]+) ± ", one.source).groups()
        assert (int(place), float(told_value)) == (table, value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_comments_say_holds(name):
    text = path_of(name).read_text()
    fine_tuned, table = re.search(r"the paper has ([\d.]+ and [\d.]+) \(Table (\d)\)", text).groups()
    assert tuple(map(float, fine_tuned.split(" and "))) == PUBLISHED[name][-2:]
    assert int(table) == (3 if name in ("cifar100", "imagenet_r", "imagenet_a") else 5)
    other, corrected = (line[4:].split() for line in text.splitlines() if line.startswith("#   "))
    assert load_recipe(path_of(name), other).model.backbone.endswith(".augreg_in21k_ft_in1k")
    recipe = load_recipe(path_of(name), corrected)
    assert recipe.method.options["recipe"] == "corrected"
    assert recipe.preprocessing.normalise
    assert recipe.expected == ()


def test_the_commands_of_the_page_are_valid():
    page = (RECIPES.parent / "docs" / "ntk_cl.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("forgetcast run ")]
    assert len(commands) == 3
    for _, _, path, *words in commands:
        recipe = load_recipe(RECIPES.parent / path, [word for word in words if "=" in word])
        assert recipe.model.backbone == "timm:vit_base_patch16_224.augreg_in21k"


def followed(record, name):
    """Hold a dry run against what the recipe says."""
    base, increment = PUBLISHED[name][1:3]
    assert record["state"] == "finished"
    assert record["cached_features"] is None
    assert [len(classes) for classes in record["task_classes"]] == [base, increment]
    evaluation, training = (record["preprocessing"][part]["steps"] for part in ("evaluation", "training"))
    assert evaluation[:2] == [{"step": "Resize", "size": 18}, {"step": "CentreCrop", "size": 16}]
    crop = {"area": [0.05, 1.0], "ratio": [3 / 4, 4 / 3], "interpolation": "bilinear"}
    assert training[0] == {"step": "RandomResizedCrop", "size": 16, **crop}
    assert training[1] == {"step": "HorizontalFlip", "probability": 0.5}
    assert training[2:] == evaluation[2:]
    sizes = [sum(1 + int(label[-2:]) % 3 for label in own) for own in named(record)]
    last = sum(size * right for size, right in zip(sizes, record["accuracy_matrix"][-1], strict=True)) / sum(sizes)
    assert record["metrics"]["last_sample_accuracy"] == pytest.approx(last)
    first = record["accuracy_matrix"][0][0]
    assert record["metrics"]["average_sample_accuracy"] == pytest.approx((first + last) / 2)
    return evaluation[2:]


def named(record):
    return [[record["classes"][output] for output in outputs] for outputs in record["task_classes"]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_dry_run(name, drawn, vit, tmp_path):
    recipe = load_recipe(path_of(name), [*short(name, drawn), f"model.backbone=hf:{vit}"])
    folder = execute(recipe, tmp_path)
    record = read_record(folder)
    assert followed(record, name) == []
    assert [event["run_step"] for event in record["epoch_losses"]] == [2, 4]
    measured = {one["metric"]: one["measured"] for one in record["expected"]}
    assert measured == {key: record["metrics"][key] for key in ("average_sample_accuracy", "last_sample_accuracy")}
    sections = 3 if PUBLISHED[name][7] else 2
    prompts, adapters = 2 * (5 * 10 + 10 + 2 * 16), 2 * (2 * 16 * 16 + 16 + 16)
    fusion = 3 * ((16 * sections) ** 2 + 16 * sections)
    proxies = [1 + 16 * sections * classes for classes in PUBLISHED[name][1:3]]
    assert record["trainable_parameters"] == [prompts + adapters + fusion + own for own in proxies]


@pytest.mark.parametrize("name", ["cifar100", "oxford_pets"])
def test_a_dry_run_of_what_the_paper_says(name, drawn, vit, tmp_path):
    corrected = ["method.recipe=corrected", "preprocessing.normalise=true", "expected=[]"]
    record = read_record(
        execute(load_recipe(path_of(name), [*short(name, drawn), f"model.backbone=hf:{vit}", *corrected]), tmp_path)
    )
    assert followed(record, name) == [{"step": "Normalise", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(32), Attention(), nn.LayerNorm(32), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyTimm(nn.Module):
    """A vision transformer with timm's names for its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 5, 32))
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(32)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), 1, 32), patches], 1) + self.pos_embed
        return self.norm(self.blocks(tokens))[:, 0]


def test_a_dry_run_with_the_backbone_that_the_recipe_names(drawn, tmp_path, monkeypatch):
    """timm itself needs torchvision; what it makes has these parts under these names."""
    asked = []

    def create_model(name, **options):
        asked.append(name)
        return TinyTimm()

    module = ModuleType("timm")
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    record = read_record(execute(load_recipe(path_of("kvasir"), short("kvasir", drawn)), tmp_path))
    assert followed(record, "kvasir") == []
    assert asked == ["vit_base_patch16_224.augreg_in21k"]
