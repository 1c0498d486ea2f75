"""Intransigence and forgetting rate of records beside joint training on the same stream."""

import pytest

from forgetcast.metrics.transfer import forgetting_rate, intransigence
from forgetcast.runs.references import with_reference

OWN = [[0.9], [0.5, 0.75]]
JOINT = [[0.8], [0.9, 0.95]]


def record(matrix, seed=0, *, joint=False, told=False, **more):
    return {
        "name": "joint" if joint else "own",
        "seed": seed,
        "split_hash": f"split{seed}",
        "source": {"hash": "samples"},
        "trains_on_all_tasks": joint,
        "task_classes": [[0, 1], [2, 3]],
        "accuracy_matrix": matrix,
        "task_incremental_matrix": matrix if told else [[1.0], [1.0, 1.0]],
        "metrics": {"last_accuracy": 0.5},
    } | more


def test_each_record_meets_the_joint_run_of_its_own_stream():
    records = [record(OWN, seed) for seed in (0, 1)]
    other = [[0.6], [0.7, 0.8]]
    joint = [record(other, 1, joint=True), record(JOINT, 0, joint=True), record(JOINT, 7, joint=True)]
    found = with_reference(records, joint, "intransigence")
    assert [one["metrics"] for one in found] == [
        {"last_accuracy": 0.5, "intransigence": intransigence(OWN, [0.8, 0.95])},
        {"last_accuracy": 0.5, "intransigence": intransigence(OWN, [0.6, 0.8])},
    ]
    assert "intransigence" not in records[0]["metrics"]


@pytest.mark.parametrize(("told", "chance"), [(False, 0.25), (True, 0.5)])
def test_chance_is_that_of_the_scenario(told, chance):
    (found,) = with_reference([record(OWN, told=told)], [record(JOINT, joint=True)], "forgetting_rate")
    assert found["metrics"]["forgetting_rate"] == pytest.approx(forgetting_rate(OWN, [0.9, 0.95], [chance, chance]))


@pytest.mark.parametrize(
    ("joint", "metric", "message"),
    [
        (
            [record(JOINT)],
            "intransigence",
            "the reference own trains on the samples of each task alone; expected a run",
        ),
        ([], "intransigence", "0 references for own with seed 0; expected one joint run.*Run the method joint"),
        ([record(JOINT, joint=True)] * 2, "intransigence", "2 references for own"),
        ([record(JOINT, joint=True, split_hash="other")], "intransigence", "0 references"),
        ([record(JOINT, joint=True, source={"hash": "other"})], "intransigence", "0 references"),
        ([record(JOINT, joint=True)], "last_accuracy", "got metric='last_accuracy'; expected one of"),
    ],
)
def test_references_that_do_not_fit(joint, metric, message):
    with pytest.raises(ValueError, match=message):
        with_reference([record(OWN)], joint, metric)
    with pytest.raises(ValueError, match=message):
        with_reference([record(OWN)], joint, metric)


def test_streams_without_a_hash_are_never_taken_for_the_same():
    bare = [record(JOINT, joint=joint, split_hash=None) for joint in (False, True)]
    with pytest.raises(ValueError, match="1 references"):
        with_reference(bare[:1], bare[1:], "intransigence")
