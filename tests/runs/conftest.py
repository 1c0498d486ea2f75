"""Recipes whose methods are the tests' own, tiny pretrained models, and small data sets on disk: nothing downloaded."""

import json

import numpy as np
import pytest
from PIL import Image

from forgetcast.methods.registry import METHODS
from forgetcast.runs.recipe import build_recipe

TOPICS = {
    "animals": "cat dog bird fish",
    "sky": "sun rain cloud wind",
    "sport": "goal match team ball",
    "law": "vote court judge act",
}


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    monkeypatch.setitem(METHODS, "plain", "example_methods:Plain")
    monkeypatch.setitem(METHODS, "closed", "example_methods:Closed")


@pytest.fixture(autouse=True)
def _whole_runs(unchecked_types):
    """Without run-time type checks, which take a third of the time: what is called has tests of its own with them."""


@pytest.fixture
def tree():
    return {"name": "example", "data": {"source": "digits", "increment": 2}, "method": {"name": "plain"}}


@pytest.fixture
def recipe(tree):
    return build_recipe(tree)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A directory with a small BERT and its tokenizer, as a user would save them."""
    transformers = pytest.importorskip("transformers")
    import torch

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", *" ".join(TOPICS.values()).split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, vocab_size=len(words), max_position_embeddings=16)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """A directory with a small ViT and its preprocessing."""
    transformers = pytest.importorskip("transformers")
    import torch

    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder)
    own = {"size": 20, "crop_size": 16, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Two tables with the same 4 classes of 24 short texts each: a CSV and a JSON lines file."""
    folder = tmp_path_factory.mktemp("texts")
    draw = np.random.default_rng(0)
    rows = [
        {"said": " ".join(draw.choice(["the", *words.split()], draw.integers(2, 7))), "topic": topic}
        for topic, words in TOPICS.items()
        for _ in range(24)
    ]
    (folder / "news.csv").write_text("said,topic\n" + "\n".join(f"{row['said']},{row['topic']}" for row in rows))
    (folder / "talk.jsonl").write_text("\n".join(json.dumps({**row, "said": f"the {row['said']}"}) for row in rows))
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 4 classes of 12 noisy images, each class of its own colour, in two shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for name, colour in (("red", 0), ("green", 1), ("blue", 2), ("grey", None)):
        (folder / name).mkdir()
        for index in range(12):
            pixels = draw.integers(0, 120, (18, 18 + 6 * (index % 2), 3))
            pixels[..., colour if colour is not None else slice(None)] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A function that draws a folder of so many classes, unlike in shape and size, as a user would bring them."""
    draw = np.random.default_rng(0)

    def folder(classes):
        root = tmp_path_factory.mktemp("drawn")
        for index in range(classes):
            for part, images in (("train", 2), ("test", 1 + index % 3)):
                own = root / part / f"class{index:02}"
                own.mkdir(parents=True)
                for image in range(images):
                    pixels = draw.integers(0, 256, (18 + index % 4, 24 - image, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(own / f"{image}.png")
        return root

    return folder
