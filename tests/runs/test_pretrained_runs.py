"""Recipes on pretrained backbones: texts and images from disk, features computed once, and what trains."""

from io import StringIO

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from forgetcast.backbones.pretrained import Pretrained
from forgetcast.learn.seeding import sample_generator, seed_everything
from forgetcast.modes import evaluating
from forgetcast.runs.assembly import assemble
from forgetcast.runs.data import stream_of
from forgetcast.runs.execute import execute
from forgetcast.runs.forecast import forecast_recipe
from forgetcast.runs.inputs import inputs_of
from forgetcast.runs.prepare import prepare, pretrained_of
from forgetcast.runs.recipe import build_recipe
from forgetcast.runs.record import read_record
from forgetcast.runs.sections import ModelChoice, PreprocessingChoice
from forgetcast.streams.files import image_folder
from forgetcast.streams.transforms import CentreCrop, Pipeline, Resize

NUMBERS = ("accuracy_matrix", "per_class_accuracy", "trainable_parameters", "class_order", "split_hash")


def recipe(source, backbone, method=None, *, scenario=None, training=None, preprocessing=None, **model):
    return build_recipe(
        {
            "name": "pretrained",
            "data": {"source": source, **(scenario or {"increment": 2})},
            "model": {"backbone": f"hf:{backbone}"} | model,
            "preprocessing": preprocessing or {},
            "method": {"name": "sequential"} | (method or {}),
            "training": {"learning_rate": 0.01, "epochs": 2} if training is None else training,
        }
    )


def table(texts, file="news.csv"):
    return {"kind": file.rpartition(".")[2], "path": str(texts / file), "text": "said", "label": "topic"}


SHORT = {"max_length": 12}


@pytest.mark.parametrize(
    ("method", "training"),
    [({"name": "replay", "capacity": 20}, None), ({"name": "ranpac", "size": 64}, {}), ({"name": "icarl"}, None)],
)
def test_cached_texts_give_the_accuracies_of_uncached_ones(texts, bert, tmp_path, method, training):
    records = [
        read_record(
            execute(recipe(table(texts), bert, method, training=training, preprocessing=SHORT, cache=cache), tmp_path)
        )
        for cache in (False, True)
    ]
    for key in NUMBERS:
        assert records[0][key] == records[1][key], key
    if training == {}:  # the others keep samples, of which a feature is smaller than a text
        assert records[0]["stored_numbers"] == records[1]["stored_numbers"]
    assert records[0]["cached_features"] is None
    assert records[1]["cached_features"]["samples"] == 96
    assert records[1]["backbone"]["width"] == 16


def test_features_are_computed_once_for_all_runs(texts, bert, tmp_path):
    given = {"preprocessing": SHORT, "method": {"name": "slda"}, "training": {}}
    first = read_record(execute(recipe(table(texts), bert, **given), tmp_path))
    other = recipe(table(texts), bert, **given).dump() | {"seed": 3}
    second = read_record(execute(build_recipe(other), tmp_path))
    assert first["cached_features"]["computed"] == 96
    assert second["cached_features"]["computed"] == 0
    assert second["cached_features"]["key"] == first["cached_features"]["key"]
    assert second["split_hash"] != first["split_hash"]
    for changed in ({"preprocessing": {"max_length": 3}}, {"pooling": "class_token"}):
        third = read_record(execute(recipe(table(texts), bert, **(given | changed)), tmp_path))
        assert third["cached_features"]["computed"] == 96


def test_a_terminal_is_told_of_features_that_are_computed(texts, bert, tmp_path):
    given = recipe(table(texts), bert, {"name": "slda"}, training={}, preprocessing=SHORT)
    told = []
    for _ in range(2):
        console = Console(file=StringIO(), force_terminal=True, width=100)
        execute(given, tmp_path, console)
        told.append(console.file.getvalue())
    assert "features" in told[0]
    assert "96/96" in told[0]
    assert "features" not in told[1]


def test_the_same_recipe_twice_gives_the_same_numbers(texts, bert, tmp_path):
    given = recipe(table(texts), bert, {"name": "der"}, preprocessing=SHORT, trainable="all")
    first, second = (read_record(execute(given, tmp_path / name)) for name in ("one", "two"))
    for key in (*NUMBERS, "metrics", "stored_numbers", "weights_hash", "recipe_hash", "preprocessing"):
        assert first[key] == second[key], key
    assert first["backbone"]["trainable"] == "all"


def test_what_trains_is_what_the_recipe_says(texts, bert, tmp_path):
    def trained(**model):
        record = read_record(execute(recipe(table(texts), bert, preprocessing=SHORT, **model), tmp_path))
        return record["trainable_parameters"][0]

    head = trained()
    from transformers import BertModel

    model = BertModel.from_pretrained(bert)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert head == 2 * 17
    # nothing reads the pooler of a BERT whose last hidden states are pooled
    assert trained(trainable="all") - head == sum(n for name, n in counts.items() if not name.startswith("pooler"))
    last = trained(trainable=["encoder.layer.1.*", "*.LayerNorm.bias"])
    wanted = (n for name, n in counts.items() if "layer.1." in name or name.endswith(".LayerNorm.bias"))
    assert last - head == sum(wanted)


def test_domains_of_texts(texts, bert, tmp_path):
    given = recipe(
        [table(texts), table(texts, "talk.jsonl")],
        bert,
        {"name": "ncm"},
        scenario={"scenario": "domain_incremental"},
        training={},
        preprocessing=SHORT,
    )
    record = read_record(execute(given, tmp_path))
    assert record["source"]["name"] == "news+talk"
    assert record["scenario"] == "domain-incremental"
    assert [len(row) for row in record["accuracy_matrix"]] == [1, 2]


def test_images_as_the_backbone_wants_them(pictures, vit, tmp_path):
    given = recipe(f"folder:{pictures}", vit, {"name": "slda"}, training={})
    record = read_record(execute(given, tmp_path))
    steps = record["preprocessing"]["evaluation"]["steps"]
    assert [step.pop("step") for step in steps] == ["Resize", "CentreCrop", "Normalise"]
    assert steps == [{"size": 20}, {"size": 16}, {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}]
    assert record["cached_features"]["samples"] == 48
    uncached = read_record(
        execute(build_recipe(given.dump() | {"model": given.dump()["model"] | {"cache": False}}), tmp_path)
    )
    assert uncached["accuracy_matrix"] == record["accuracy_matrix"]


def test_explicit_preprocessing_wins(pictures, vit, tmp_path):
    explicit = {"size": 16, "mean": [0.1, 0.1, 0.1], "std": [1.0, 1.0, 1.0], "crop_share": 1.0}
    given = recipe(f"folder:{pictures}", vit, preprocessing=explicit)
    stream = stream_of(given.data, 0)
    read = prepare(
        build_recipe(given.dump() | {"model": {"backbone": f"hf:{vit}", "cache": False}}), stream.source, tmp_path
    ).read
    place = next(i for i in range(len(stream.source)) if stream.source.take([i])[0].shape == (18, 18, 3))
    pixels = torch.from_numpy(stream.source.take([place])[0].transpose(2, 0, 1)[None] / np.float32(255))
    assert torch.equal(read(np.array([place])), Resize(16)(pixels) - torch.tensor(0.1))


AUGMENTED = [
    ({"random_crop": True, "padding": 2, "flip": 0.5}, ["Resize", "RandomCrop", "HorizontalFlip", "Normalise"]),
    ({"resized_crop": {"area": [0.05, 1.0]}}, ["RandomResizedCrop", "Normalise"]),
    ({"resized_crop": {}, "flip": 0.5, "normalise": False}, ["RandomResizedCrop", "HorizontalFlip"]),
    ({"flip": 0.5}, ["Resize", "CentreCrop", "HorizontalFlip", "Normalise"]),
]


@pytest.mark.parametrize(("preprocessing", "names"), AUGMENTED)
def test_augmentation_is_for_training_alone(pictures, vit, tmp_path, preprocessing, names):
    given = recipe(f"folder:{pictures}", vit, preprocessing=preprocessing)
    assert not given.cached
    source = stream_of(given.data, 0).source
    prepared = prepare(given, source, tmp_path)
    places = np.arange(6)
    assert torch.equal(prepared.read(places), prepared.read(places))

    def drawn(epoch):
        return prepared.read_training(places, [sample_generator(place, 0, 0, epoch) for place in places.tolist()])

    first, second = drawn(0), drawn(1)
    assert first.shape == second.shape == prepared.read(places).shape
    assert not torch.equal(first, second)
    assert torch.equal(first, drawn(0))
    record = read_record(execute(given, tmp_path))
    assert [step["step"] for step in record["preprocessing"]["training"]["steps"]] == names
    assert record["cached_features"] is None


def test_pixels_can_stay_as_they_are(pictures, vit):
    """With size and crop of its own, a recipe then asks the backbone for nothing: its preprocessing may be missing."""
    source, places = image_folder(pictures), np.arange(12)
    pixels = Pipeline((Resize(20), CentreCrop(16)))(source.take(places))
    own = pretrained_of(ModelChoice(backbone=f"hf:{vit}"))
    silent = Pretrained(own.module, own.network, lambda: pytest.fail("it was asked for its preprocessing"))
    explicit = PreprocessingChoice(size=16, crop_share=0.8, normalise=False)
    for choice, backbone in ((PreprocessingChoice(normalise=False), own), (explicit, silent), (explicit, None)):
        inputs = inputs_of(source, choice, backbone)
        assert torch.equal(inputs.read(places), pixels)
        assert [step["step"] for step in inputs.record["evaluation"]["steps"]] == ["Resize", "CentreCrop"]


def test_images_without_a_pretrained_backbone(pictures, tmp_path):
    tree = {
        "name": "pixels",
        "data": {"source": f"folder:{pictures}", "increment": 2},
        "model": {"backbone": "mlp:8"},
        "preprocessing": {"size": 6},
        "method": {"name": "sequential"},
    }
    record = read_record(execute(build_recipe(tree), tmp_path))
    assert record["trainable_parameters"][0] == 8 * (3 * 36 + 1) + 2 * 9
    with pytest.raises(ValueError, match=r"images of sizes .*expected one size"):
        execute(build_recipe(tree | {"preprocessing": {}}), tmp_path)
    with pytest.raises(ValueError, match="got preprocessing.random_crop=True; .*no preprocessing.size to crop to"):
        execute(build_recipe(tree | {"preprocessing": {"random_crop": True}}), tmp_path)


@pytest.mark.parametrize("crop", [{"random_crop": True, "padding": 2}, {"resized_crop": {}}])
def test_a_resumed_run_draws_the_same_crops(pictures, vit, tmp_path, monkeypatch, crop):
    given = recipe(f"folder:{pictures}", vit, preprocessing=crop | {"flip": 0.5}, trainable="all")
    whole = read_record(execute(given, tmp_path / "whole"))
    from forgetcast.learn import loop

    saved = loop.save_checkpoint

    def stopping(*args, **options):
        path = saved(*args, **options)
        monkeypatch.setattr(loop, "save_checkpoint", saved)
        raise KeyboardInterrupt
        return path

    monkeypatch.setattr(loop, "save_checkpoint", stopping)
    with pytest.raises(KeyboardInterrupt):
        execute(given, tmp_path / "cut")
    cut = read_record(execute(given, tmp_path / "cut"))
    assert cut["weights_hash"] == whole["weights_hash"]
    assert cut["accuracy_matrix"] == whole["accuracy_matrix"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocessing": {"size": 8}}, "got preprocessing.size=8; expected no size, because news holds texts"),
        ({"preprocessing": {"max_length": 17}}, "got 17 tokens a text; expected at most 16, which the model takes"),
        (
            {"trainable": ["encoder.layer.7.*"]},
            r"the pattern 'encoder.layer.7.\*' matches no parameter; expected names",
        ),
        ({"trainable": "all", "method": {"name": "probe"}}, "got model.trainable='all' with probe, which freezes"),
    ],
)
def test_what_texts_refuse(texts, bert, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        execute(recipe(table(texts), bert, **({"preprocessing": SHORT} | changes)), tmp_path)


def test_data_that_the_backbone_does_not_take(texts, pictures, bert, vit, tmp_path):
    for source, backbone, message in (
        (table(texts), vit, "cannot load the tokenizer of .*expected a model for texts"),
        (f"folder:{pictures}", bert, "cannot read the preprocessing of .*Give size, mean and std"),
        ("digits", vit, r"digits holds features of shape \(64,\); expected images or texts"),
    ):
        with pytest.raises(ValueError, match=message):
            execute(recipe(source, backbone), tmp_path)
    given = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(ValueError, match="for a model that takes input_ids"):
        execute(recipe(f"folder:{pictures}", bert, preprocessing=given), tmp_path)
    tree = {"name": "t", "data": {"source": table(texts), "increment": 2}, "method": {"name": "ncm"}}
    with pytest.raises(ValueError, match="news holds texts; expected a backbone with a tokenizer. Choose .* hf:NAME"):
        execute(build_recipe(tree), tmp_path)
    assert not list(tmp_path.glob("*/record.json"))


@pytest.mark.parametrize(
    ("tuner", "numbers"),
    [
        ({"kind": "lora", "rank": 2, "layers": [-1], "targets": ["query"]}, 2 * 16 * 2),
        ({"kind": "adapter", "rank": 3, "activation": "relu"}, 2 * 2 * 16 * 3),
        ({"kind": "prefix", "length": 3, "gated": False}, 2 * 2 * 16 * 3),
        ({"kind": "prompt", "length": 3, "layers": [0]}, 16 * 3 + 2),
    ],
)
def test_a_tuner_trains_and_the_backbone_stays(texts, bert, tmp_path, tuner, numbers):
    given = recipe(table(texts), bert, preprocessing=SHORT, tuner=tuner)
    seed_everything(0)
    prepared = prepare(given, stream_of(given.data, 0).source, tmp_path)
    training = [parameter for parameter in prepared.backbone.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in training) == numbers
    record = read_record(execute(given, tmp_path))
    rows = [numbers + 17 * seen for seen in (2, 4)]
    assert record["trainable_parameters"][: len(rows)] == rows
    assert record["backbone"]["trainable"] == "tuner"
    assert record["recipe"]["model"]["tuner"]["kind"] == tuner["kind"]
    again = read_record(execute(build_recipe(record["recipe"] | {"name": "again"}), tmp_path))
    assert again["accuracy_matrix"] == record["accuracy_matrix"]


FEW = {"animals": ["cat", "dog"], "sky": ["sun", "rain wind"], "sport": ["goal", "match"], "law": ["vote", "court"]}


@pytest.mark.filterwarnings("ignore:.*directions free:UserWarning")  # after the second task
@pytest.mark.parametrize("head", ["rows", "projected"])
def test_projected_texts_keep_the_logits_of_earlier_ones(bert, tmp_path, head):
    """Of the first task over its classes, with placed rows: 13 of 16 directions, and all 16 were padding counted."""
    rows = [("train", text, topic) for topic, own in FEW.items() for text in own]
    rows += [("test", "the", topic) for topic in FEW]
    path = tmp_path / "few.csv"
    path.write_text("split,said,topic\n" + "\n".join(",".join(row) for row in rows))

    def moved(method) -> float:
        given = recipe(
            {"kind": "csv", "path": str(path), "text": "said", "label": "topic", "split": "split"},
            bert,
            method,
            scenario={"groups": [["animals", "sky"], ["sport", "law"]]},
            training={"learning_rate": 0.01, "epochs": 40, "batch_size": 2, "weight_decay": 0.1},
            preprocessing=SHORT,
            tuner={"kind": "lora", "rank": 15},
            new_rows="placed",
        )
        made = assemble(given, tmp_path / method["name"], Accelerator(cpu=True))
        model, inputs, before = made.method.model, made.prepared.read(made.stream[0].train), []

        def logits() -> torch.Tensor:
            with torch.no_grad(), evaluating(model):
                return model(inputs)[:, :2]

        made.learn(on_event=lambda event: before.append(logits()) if event["event"] == "task" else None)
        assert [len(task.train) for task in made.stream] == [4, 4]
        return float((logits() - before[0]).norm() / before[0].norm())

    assert moved({"name": "pegp", "threshold": 1.0, "head": head}) < 1e-5
    assert moved({"name": "sequential"}) > 1e-2


@pytest.mark.filterwarnings("ignore:.*directions free:UserWarning")
@pytest.mark.parametrize(
    ("tuner", "method"),
    [
        ({"kind": "lora", "rank": 2}, {"name": "sequential"}),
        ({"kind": "adapter", "rank": 3}, {"name": "sequential"}),
        ({"kind": "adapter", "rank": 3}, {"name": "pegp", "threshold": 0.5}),
        ({"kind": "prefix", "length": 3}, {"name": "pegp", "threshold": 0.5}),
        ({"kind": "prompt", "length": 3}, {"name": "pegp", "threshold": 0.5, "head": "projected"}),
    ],
)
def test_with_the_whole_budget_the_forecast_of_a_tuned_run_is_the_run(pictures, vit, tmp_path, tuner, method):
    training = {"learning_rate": 0.003, "epochs": 2, "batch_size": 5}
    given = recipe(f"folder:{pictures}", vit, method, training=training, tuner=tuner, new_rows="placed")
    record = read_record(forecast_recipe(given, tmp_path, budget=1.0, verify=True))
    assert record["calibration"]["relative_error"] < 1e-4
    assert record["calibration"]["cosine"] > 1 - 1e-6
    assert record["left_out"] == []
    assert record["forecast"]["trusted"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "adaptive", "samples": 40}, "its gradient has cosine"),
        ({"name": "frozen", "specific": 1}, "1 of 3 modules train, because the last 1 are task-specific"),
        ({"name": "advised", "budget": 1.0, "capacity": 20}, "forecast old accuracy"),
    ],
)
def test_decisions_are_printed_and_kept(texts, bert, tmp_path, method, said):
    out = StringIO()
    made = recipe(table(texts), bert, method, preprocessing=SHORT, trainable="all")
    record = read_record(execute(made, tmp_path, Console(file=out, width=1000)))
    last = record["decisions"][-1]
    assert last["task"] == 1
    assert said in last["text"]
    assert all(decision["text"] in out.getvalue() for decision in record["decisions"])
