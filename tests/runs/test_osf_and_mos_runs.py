"""OSF and MOS by recipe, on images and on texts; and OSF forecast before it is trained."""

import pytest
from test_pretrained_runs import recipe, table

from forgetcast.runs.execute import execute
from forgetcast.runs.forecast import forecast_recipe
from forgetcast.runs.record import read_record

pytest.importorskip("peft")

OSF = {"name": "osf", "ranks": [0.25, 0.5]}
MOS = {"name": "mos", "rank": 4, "samples": 32, "epochs": 2, "contrast": 0.01}
SGD = {"optimizer": "sgd", "learning_rate": 0.05, "epochs": 4, "batch_size": 16}
ADAPTERS, STATISTICS = 2 * (2 * 16 * 4 + 16 + 4), 16 + 16**2


def test_osf_on_images(pictures, vit, tmp_path):
    source = {"kind": "folder", "path": str(pictures)}
    record = read_record(execute(recipe(source, vit, OSF, training=SGD | {"learning_rate": 0.02}), tmp_path))
    assert record["cached_features"] is None
    assert record["backbone"]["trainable"] == "none"
    first, second = (
        count - 17 * outputs for count, outputs in zip(record["trainable_parameters"], (2, 4), strict=True)
    )
    assert first * 8 == second * 12  # of 16 directions a layer 12 train, and then 8
    assert record["stored_numbers"][1] - record["stored_numbers"][0] == 2 * 17
    assert record["metrics"]["last_accuracy"] > 0.5  # four colours


def test_osf_on_texts(texts, bert, tmp_path):
    given = recipe(table(texts), bert, OSF | {"projected": "gradient"}, training=SGD, preprocessing={"max_length": 12})
    record = read_record(execute(given, tmp_path))
    assert record["stored_numbers"][1] - record["stored_numbers"][0] == 2 * 17


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_with_the_whole_budget_the_forecast_is_what_the_loop_does(pictures, vit, tmp_path, optimizer):
    source = {"kind": "folder", "path": str(pictures)}
    training = {"optimizer": optimizer, "learning_rate": 0.003, "epochs": 1, "batch_size": 5, "max_gradient_norm": 0.5}
    given = recipe(source, vit, OSF, training=training)
    record = read_record(forecast_recipe(given, tmp_path, budget=1.0, verify=True))
    assert record["left_out"] == []
    assert record["calibration"]["one_minus_cosine"] < 1e-5


def test_mos_on_images(pictures, vit, tmp_path):
    source = {"kind": "folder", "path": str(pictures)}
    record = read_record(execute(recipe(source, vit, MOS, training=SGD), tmp_path))
    assert record["cached_features"] is None
    assert record["backbone"]["trainable"] == "none"
    assert record["trainable_parameters"] == [ADAPTERS + 2 * 17, ADAPTERS + 4 * 17]
    # a class: its row, its mean under the first adapters, its count and its task, and its Gaussian
    grown = ADAPTERS + 2 * (17 + 16 + 1 + 1 + STATISTICS)
    assert record["stored_numbers"][1] - record["stored_numbers"][0] == grown
    assert record["metrics"]["last_accuracy"] > 0.5


def test_mos_on_texts_with_blocks_that_normalise_behind(texts, bert, tmp_path):
    given = recipe(table(texts), bert, MOS, training=SGD, preprocessing={"max_length": 12})
    record = read_record(execute(given, tmp_path))
    assert record["trainable_parameters"][0] == ADAPTERS + 2 * 17


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        (OSF, {"trainable": "all"}, "puts parts of its own into the blocks of a frozen backbone"),
        (OSF, {"tuner": {"kind": "lora"}}, "puts parts of its own"),
        (OSF, {"cache": True}, "puts parts of its own"),
        (OSF | {"rank": 4}, {}, "osf has no option method.rank"),
        (MOS, {"tuner": {"kind": "adapter"}}, "puts parts of its own"),
        (MOS, {"head": "cosine"}, "brings its own head"),
        (MOS | {"temperature": 1.0}, {}, "mos has no option method.temperature"),
    ],
)
def test_recipes_that_do_not_fit(pictures, vit, method, model, message):
    with pytest.raises(ValueError, match=message):
        recipe({"kind": "folder", "path": str(pictures)}, vit, method, **model)


@pytest.mark.parametrize("method", [MOS, OSF | {"projected": "gradient"}])
def test_a_forecast_of_more_than_fine_tuning_is_refused(pictures, vit, tmp_path, method):
    given = recipe({"kind": "folder", "path": str(pictures)}, vit, method, training=SGD)
    with pytest.raises(ValueError, match=method["name"]):
        forecast_recipe(given, tmp_path)
