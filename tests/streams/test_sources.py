"""Sources: whatever the samples are and wherever they lie, one index finds them."""

import json

import numpy as np
import pytest
from PIL import Image

from forgetcast.streams.addresses import source_from
from forgetcast.streams.files import image_folder, table
from forgetcast.streams.sources import Source, arrays, digits


def write_image(path, colour, size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_arrays_know_their_kind():
    images = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    source = arrays(images, [1, 0], images[:1], [1], name="pictures")
    assert (source.kind, source.name, len(source)) == ("images", "pictures", 3)
    assert source.test.tolist() == [2]
    assert np.array_equal(source.take([2, 1]), images[[0, 1]])
    texts = arrays(["b", "a much longer text"], ["yes", "no"])
    assert (texts.kind, texts.class_names) == ("texts", ("no", "yes"))
    assert texts.labels.tolist() == [1, 0]
    assert texts.take([1]) == ["a much longer text"]
    features = arrays(np.array([[0, 255], [51, 0]], dtype=np.uint8), np.array([5, 7]))
    assert features.kind == "features"
    assert np.allclose(features.take([0, 1]), [[0, 1], [0.2, 0]])
    assert features.labels.tolist() == [5, 7]


def test_hash_follows_inputs_and_labels():
    one = arrays(["ab", "c"], [0, 1])
    assert one.hash == arrays(["ab", "c"], [0, 1]).hash
    others = [arrays(["a", "bc"], [0, 1]), arrays(["ab", "c"], [1, 0]), arrays(["ab", "d"], [0, 1])]
    assert len({one.hash, *(other.hash for other in others)}) == 4


def test_labels_such_as_007_are_names():
    assert arrays(["a", "b"], ["007", "7"]).class_names == ("007", "7")
    assert arrays(["a", "b"], ["10", "7"]).labels.tolist() == [10, 7]


def test_image_folder_reads_when_taken(tmp_path):
    write_image(tmp_path / "dog" / "1.png", (255, 0, 0))
    write_image(tmp_path / "cat" / "2.png", (0, 255, 0), size=(2, 7))
    write_image(tmp_path / "cat" / "1.png", (0, 0, 255))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    source = image_folder(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 1]
    assert source.test is None
    dog, green = source.take([2, 1])
    assert dog.shape == (4, 5, 3)
    assert green.shape == (7, 2, 3)
    assert np.array_equal(dog[0, 0], [255, 0, 0])
    assert np.array_equal(green[-1, -1], [0, 255, 0])
    before = source.hash
    write_image(tmp_path / "dog" / "1.png", (254, 0, 0))
    assert image_folder(tmp_path).hash != before
    (tmp_path / "dog" / "1.png").write_text("broken")
    with pytest.raises(ValueError, match="cannot read .*1.png.*expected an image that Pillow reads"):
        source.take([2])


def test_image_folder_with_train_and_test(tmp_path):
    for part, colour in (("train", (1, 1, 1)), ("test", (2, 2, 2))):
        for name in ("cat", "dog"):
            write_image(tmp_path / part / name / "1.png", colour)
    source = source_from(f"folder:{tmp_path}")
    assert source.test.tolist() == [2, 3]
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert [int(image.max()) for image in source.take(source.test)] == [2, 2]


def test_empty_class_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no sub-folders; expected a folder with one sub-folder"):
        image_folder(tmp_path / "absent")
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="cat holds no images"):
        image_folder(tmp_path)


def test_table_of_both_layouts(tmp_path):
    rows = [("None", "NA", "train"), ('said "so", twice', "b", "test"), ("", "b", "train")]
    csv, jsonl = tmp_path / "texts.csv", tmp_path / "texts.jsonl"
    csv.write_text('body,my class,part\nNone,NA,train\n"said ""so"", twice",b,test\n,b,train\n')
    jsonl.write_text("\n".join(json.dumps(dict(zip(("body", "my class", "part"), r, strict=True))) for r in rows))
    for source in (
        table(csv, text="body", label="my class", split="part"),
        source_from(f"csv:{csv}?text=body&label=my%20class&split=part"),
        source_from(f"jsonl:{jsonl}?text=body&label=my+class&split=part"),
    ):
        assert source.take(range(3)) == [text for text, _, _ in rows]
        assert source.class_names == ("NA", "b")
        assert source.labels.tolist() == [0, 1, 1]
        assert source.test.tolist() == [1]
    assert table(csv, text="body", label="my class").test is None


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a,b\nx,1\n", {"text": "a", "label": "c"}, r"has no 'c'; expected one of its columns: \['a', 'b'\]"),
        ("a,b\nx,\n", {"text": "a", "label": "b"}, "label '' of sample 0; expected a whole number or a name"),
        ("a,b\nx,dev\n", {"text": "a", "label": "a", "split": "b"}, r"holds \['dev'\]; expected only 'train' and"),
        ('{"a": 3}', {"text": "a", "label": "a", "layout": "jsonl"}, "a=3 in sample 0; expected a text"),
        ('{"a": 3', {"text": "a", "label": "a", "layout": "jsonl"}, "expected one JSON object a line"),
        ("[1]", {"text": "a", "label": "a", "layout": "jsonl"}, "has no 'a'"),
        ("", {"text": "a", "label": "a"}, "expected a CSV file with a header"),
    ],
)
def test_bad_tables_are_refused(tmp_path, content, options, message):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        table(path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "texts"}, r"texts of shape \(4, 4\) and type float32; expected \(n,\) of str"),
        ({"kind": "images"}, r"expected \(n, h, w, 3\) of uint8, or \(n,\) image files"),
        ({"test": np.array([1, 1])}, "expected distinct indices below 4"),
        ({"test": np.array([4])}, "expected distinct indices below 4"),
        ({"class_names": ("a",)}, "labels from 0 to 1; expected labels from 0 to 0"),
        ({"inputs": np.array(["a"] * 4)}, "features of type <U1; expected numbers"),
    ],
)
def test_sources_that_do_not_fit_are_refused(options, message):
    fitting = {"name": "mine", "inputs": np.eye(4, dtype=np.float32), "labels": np.arange(4) % 2}
    with pytest.raises(ValueError, match=message):
        Source(**(fitting | options))


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one of x_test and y_test is missing; expected both or neither"):
        arrays(np.eye(2), [0, 1], np.eye(2))
    with pytest.raises(ValueError, match="expected samples of one shape and type"):
        arrays(np.eye(2), [0, 1], np.eye(3), [0, 1, 2])
    with pytest.raises(ValueError, match="label 0.5 of sample 0; expected a whole number or a name"):
        arrays(np.eye(2), np.array([0.5, 1]))


def test_addresses(tmp_path):
    assert source_from("digits").hash == digits().hash
    np.savez(tmp_path / "mine.npz", x=np.eye(2), y=np.arange(2))
    assert source_from(f"npz:{tmp_path / 'mine.npz'}").name == "mine"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("digts", "Did you mean 'digits'"),
        ("cvs:x", "expected one of"),
        ("csv:x?text=a", r"expected csv:PLACE\?text=...&label=.... Unknown options: \[\]; missing: \['label'\]"),
        ("npz:x?text=a", r"Unknown options: \['text'\]"),
        ("npz:", "expected npz:PLACE"),
    ],
)
def test_bad_addresses_are_refused(address, message):
    with pytest.raises(ValueError, match=message):
        source_from(address)
