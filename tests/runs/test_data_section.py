"""The section `data`: whatever Python's scenarios give, a recipe gives too, sample for sample."""

import json

import numpy as np
import pytest

from forgetcast.runs.data import READS, Data, stream_of
from forgetcast.streams.addresses import READERS
from forgetcast.streams.domains import domain_incremental
from forgetcast.streams.files import image_folder, table
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import digits
from forgetcast.streams.variants import blurry, few_shot, long_tailed


def data(**keys):
    return Data.model_validate_json(json.dumps({"source": "digits"} | keys))


SCENARIOS = {
    "increment": ({"increment": 3, "base": 4}, lambda s: class_incremental(s, 3, base=4, seed=5)),
    "groups": (
        {"groups": [[3, 1], [0, 2, 4], [5, 6, 7, 8, 9]]},
        lambda s: class_incremental(s, groups=[[3, 1], [0, 2, 4], [5, 6, 7, 8, 9]], seed=5),
    ),
    "order and shares": (
        {"increment": 5, "class_order": list(range(10)), "test_share": 0.3, "validation_share": 0.1},
        lambda s: class_incremental(s, 5, class_order=range(10), test_share=0.3, validation_share=0.1, seed=5),
    ),
    "task-incremental": (
        {"scenario": "task_incremental", "increment": 2},
        lambda s: class_incremental(s, 2, task_incremental=True, seed=5),
    ),
    "online": ({"increment": 2, "online": True}, lambda s: class_incremental(s, 2, online=True, seed=5)),
    "few-shot": (
        {"scenario": "few_shot", "base": 6, "ways": 2, "shots": 5},
        lambda s: few_shot(s, base=6, ways=2, shots=5, seed=5),
    ),
    "long-tailed": (
        {"increment": 2, "long_tailed": {"imbalance": 20, "ordered": False}},
        lambda s: long_tailed(class_incremental(s, 2, seed=5), imbalance=20, ordered=False),
    ),
    "blurry and long-tailed": (
        {"increment": 2, "long_tailed": {"imbalance": 5}, "blurry": {"share": 0.3, "disjoint": 0.5}},
        lambda s: blurry(long_tailed(class_incremental(s, 2, seed=5), imbalance=5), 0.3, disjoint=0.5),
    ),
    "domains": (
        {"scenario": "domain_incremental", "source": ["digits", "digits"], "online": True},
        lambda s: domain_incremental([s, s], online=True, seed=5),
    ),
}


@pytest.mark.parametrize(("keys", "made"), SCENARIOS.values(), ids=list(SCENARIOS))
def test_streams_are_those_of_python(keys, made):
    assert stream_of(data(**keys), 5).split_hash == made(digits()).split_hash


def test_every_key_is_read_by_some_scenario():
    read = {key for keys in READS.values() for key in keys}
    assert read | {"source", "scenario", "test_share", "validation_share"} == set(Data.model_fields)


def test_sources_as_addresses_and_as_keys(texts, pictures, tmp_path):
    np.savez(tmp_path / "mine.npz", x=np.eye(8), y=np.arange(8) % 2)
    csv = table(texts / "news.csv", text="said", label="topic")
    for source, expected in (
        (f"csv:{texts}/news.csv?text=said&label=topic", csv.hash),
        ({"kind": "csv", "path": f"{texts}/news.csv", "text": "said", "label": "topic"}, csv.hash),
        ({"kind": "csv", "path": f"{texts}/news.csv", "text": "said", "label": "topic", "split": None}, csv.hash),
        ({"kind": "digits"}, digits().hash),
        (f"folder:{pictures}", image_folder(pictures).hash),
        ({"kind": "folder", "path": str(pictures)}, image_folder(pictures).hash),
    ):
        assert stream_of(data(source=source, increment=2), 0).source.hash == expected
    assert stream_of(data(source={"kind": "npz", "path": f"{tmp_path}/mine.npz"}, increment=1), 0).source.name == "mine"


def test_hugging_face_data_with_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"said": ["a b", "c d"] * 6, "topic": ["x", "y"] * 6}
    parts = {name: datasets.Dataset.from_dict(rows) for name in ("train", "holdout")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "news")
    keys = {"kind": "hf", "name": str(tmp_path / "news"), "input": "said", "label": "topic", "test": "holdout"}
    stream = stream_of(data(source=keys, groups=[["y"], ["x"]]), 0)
    assert stream.source.class_names == ("x", "y")
    assert [len(task.train) for task in stream.tasks] == [6, 6]
    assert stream.class_order == (1, 0)
    with pytest.raises(ValueError, match="got data.test_share=0.4; expected no test_share, because news has test"):
        stream_of(data(source=keys, increment=1, test_share=0.4), 0)


CSV = {"kind": "csv", "path": "a.csv", "text": "said", "label": "topic"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": CSV | {"lable": "x"}}, "nothing reads the key data.source.lable; .*Did you mean 'data.source.lab"),
        ({"source": CSV | {"kind": "cvs"}}, "got data.source.kind='cvs'; .*Did you mean 'csv'"),
        ({"source": CSV | {"text": 3}}, "got data.source.text=3; expected text"),
        ({"source": CSV | {"text": None}}, "got data.source.text=None; expected text"),
        ({"source": {"kind": "csv", "path": "a"}}, "no data.source.text; expected a value, because csv"),
        ({"source": {"path": "a"}}, "got data.source={'path': 'a'}; expected digits, an address"),
        ({"source": {"kind": "digits", "path": "a"}}, "nothing reads the key data.source.path"),
        ({"source": "csv:a?text=b"}, r"missing: \['label'\]"),
        ({"source": ["digits", CSV | {"txt": "b"}]}, "nothing reads the key data.source.1.txt"),
        ({"source": ["digits"]}, r"got data.source=\['digits'\] with class_incremental; expected one source"),
        ({"scenario": "domain_incremental"}, "expected a list of sources, one a domain"),
        ({"scenario": "few_shot", "base": 4, "ways": 2}, "no data.shots; expected a value, because few_shot"),
        ({"scenario": "few_shot", "increment": 2}, "got data.increment=2; .*few_shot reads base, ways, shots"),
        ({"increment": 2, "shots": 2}, "got data.shots=2; expected no shots, because class_incremental reads"),
        ({"groups": [[0], [1]], "increment": 1}, "got data.increment=1; expected no increment, because groups"),
        ({"groups": [[0], [1]], "base": 1}, "got data.base=1; expected no base, because groups"),
        ({}, "no data.increment; expected the new classes.*or data.groups"),
        (
            {"scenario": "domain_incremental", "source": ["digits", "digits"], "blurry": {"share": 0.1}},
            "got data.blurry={'share': 0.1, 'disjoint': 0.0}; expected no blurry, because domain_incremental reads",
        ),
    ],
)
def test_impossible_keys_are_refused(tree, keys, message):
    from forgetcast.runs.recipe import build_recipe

    with pytest.raises(ValueError, match=message):
        build_recipe(tree | {"data": {"source": "digits"} | keys})


def test_every_kind_of_source_is_one_that_a_recipe_can_say():
    for kind, reader in READERS.items():
        given = {"kind": kind} | {name: "x" for name in (reader.place, *reader.required) if name}
        assert data(source=given, increment=1).source == given
