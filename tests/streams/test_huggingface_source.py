"""The `datasets` library as a source: saved folders and local files, without a network."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from forgetcast.streams.addresses import source_from
from forgetcast.streams.huggingface import huggingface


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_class_labels_keep_their_names(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "topic": datasets.ClassLabel(names=["world", "sport"])}
    )
    parts = {
        "train": datasets.Dataset.from_dict({"text": ["a", "b"], "topic": [1, 0]}, features=features),
        "test": datasets.Dataset.from_dict({"text": ["c"], "topic": [1]}, features=features),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "news")
    source = source_from(f"hf:{tmp_path / 'news'}?input=text&label=topic")
    assert (source.name, source.kind, source.class_names) == ("news", "texts", ("world", "sport"))
    assert source.take([0, 1, 2]) == ["a", "b", "c"]
    assert source.labels.tolist() == [1, 0, 1]
    assert source.test.tolist() == [2]
    with pytest.raises(ValueError, match=r"has no split 'dev'; expected one of \['test', 'train'\]"):
        huggingface(tmp_path / "news", input="text", label="topic", test="dev")
    with pytest.raises(ValueError, match=r"has no 'class'; expected one of its columns: \['text', 'topic'\]"):
        huggingface(tmp_path / "news", input="text", label="class")


def test_images_are_decoded_when_taken(tmp_path):
    pixels = [np.full((3 + i, 4, 3), 40 * i, dtype=np.uint8) for i in range(3)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": ["b", "a", "b"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "pictures")
    source = huggingface(tmp_path / "pictures", input="image", label="label", test=None)
    assert (source.kind, source.class_names, source.test) == ("images", ("a", "b"), None)
    assert source.labels.tolist() == [1, 0, 1]
    for taken, index in zip(source.take([2, 0]), [2, 0], strict=True):
        assert np.array_equal(taken, pixels[index])


def test_local_file_of_numbers(tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text("\n".join(json.dumps({"x": [i, 2.5], "y": 3 * i}) for i in range(4)))
    source = source_from(f"hf:{path}?input=x&label=y&test=")
    assert source.kind == "features"
    assert source.inputs.dtype == np.float32
    assert np.array_equal(source.inputs, [[i, 2.5] for i in range(4)])
    assert source.labels.tolist() == [0, 3, 6, 9]


def test_absent_data_set_is_a_message(tmp_path):
    with pytest.raises(ValueError, match="cannot load .*absent.*expected a Hugging Face data set"):
        huggingface(tmp_path / "absent", input="x", label="y")
