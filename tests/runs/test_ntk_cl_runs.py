"""NTK-CL by recipe: its parts go into a pretrained backbone, whose features are not computed beforehand."""

import pytest
from test_pretrained_runs import recipe, table

from forgetcast.runs.execute import execute
from forgetcast.runs.recipe import build_recipe
from forgetcast.runs.record import read_record

OPTIONS = {"name": "ntk_cl", "prompts": 2, "rank": 4}


@pytest.mark.parametrize("ways", [{}, {"recipe": "released", "tasks": 2, "contrast": 0.03}])
def test_a_run_on_images(pictures, vit, tmp_path, ways):
    source = {"kind": "folder", "path": str(pictures)}
    given = recipe(source, vit, OPTIONS | ways, training={"optimizer": "sgd", "learning_rate": 0.05, "epochs": 3})
    record = read_record(execute(given, tmp_path))
    assert record["cached_features"] is None
    assert record["backbone"]["trainable"] == "none"
    assert record["metrics"]["last_accuracy"] > 0.5  # four colours
    proxies = 2 * 2 * 16 + 1
    adapters = 2 * (2 * 16 * 4 + 16 + 4)
    prompts, fusion = 2 * (5 * 2 + 3 * 16), 4 * 16 * 32
    if ways:
        prompts, fusion = 2 * (5 * 2 + 2 + 2 * 16), 3 * (32 * 32 + 32)
    assert record["trainable_parameters"] == [adapters + prompts + fusion + proxies] * 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"trainable": "all"}, "puts parts of its own into the blocks of a frozen backbone"),
        ({"tuner": {"kind": "lora"}}, "puts parts of its own"),
        ({"cache": True}, "puts parts of its own"),
        ({"head": "cosine"}, "brings its own head"),
    ],
)
def test_recipes_that_do_not_fit(pictures, vit, model, message):
    with pytest.raises(ValueError, match=message):
        recipe({"kind": "folder", "path": str(pictures)}, vit, OPTIONS, **model)


def test_a_backbone_without_blocks_is_refused(pictures, vit):
    given = recipe({"kind": "folder", "path": str(pictures)}, vit, OPTIONS).dump()
    with pytest.raises(ValueError, match=r"model.backbone='mlp'.*a pretrained transformer"):
        build_recipe(given | {"model": {"backbone": "mlp"}})


def test_blocks_that_normalise_behind_attention_are_refused(texts, bert, tmp_path):
    given = recipe(table(texts), bert, OPTIONS, preprocessing={"max_length": 12})
    with pytest.raises(ValueError, match="blocks that normalise before attention"):
        execute(given, tmp_path)
