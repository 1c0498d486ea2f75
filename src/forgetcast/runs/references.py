"""Metrics of a record that need the record of joint training on the same stream."""

from collections.abc import Callable, Sequence
from typing import Any

from forgetcast.checks import complaint, require_choice
from forgetcast.metrics.transfer import forgetting_rate, intransigence

Record = dict[str, Any]


def _intransigence(record: Record, joint: Record) -> float:
    return intransigence(record["accuracy_matrix"], [row[-1] for row in joint["accuracy_matrix"]])


def _forgetting_rate(record: Record, joint: Record) -> float:
    tasks = record["task_classes"]
    told = record["accuracy_matrix"] == record["task_incremental_matrix"]
    everything = len({output for task in tasks for output in task})
    chance = [1 / (len(task) if told else everything) for task in tasks]
    return forgetting_rate(record["accuracy_matrix"], joint["accuracy_matrix"][-1], chance)


REFERENCED: dict[str, Callable[[Record, Record], float]] = {
    "intransigence": _intransigence,
    "forgetting_rate": _forgetting_rate,
}


def with_reference(records: Sequence[Record], joint: Sequence[Record], metric: str) -> list[Record]:
    """The records with one more metric: `intransigence` or `forgetting_rate` (`forgetcast.metrics.transfer`).

    Args:
        records: of finished runs.
        joint: of joint training, one for each seed and stream; those of other streams are not read.
        metric: one of the two.

    Raises:
        ValueError: another metric, a reference that is no joint training, a record without a reference of its stream
            (class order, split and samples), or with two.
    """
    require_choice("metric", metric, REFERENCED)
    for reference in joint:
        if reference.get("trains_on_all_tasks") is not True:
            raise complaint(
                f"the reference {reference.get('name')} trains on the samples of each task alone",
                "a run of joint training on all tasks so far",
                "Give a run of the method joint.",
            )
    return [_with_metric(record, joint, metric) for record in records]


def _with_metric(record: Record, joint: Sequence[Record], metric: str) -> Record:
    stream = _stream_of(record)
    own = [reference for reference in joint if _stream_of(reference) == stream]
    if len(own) != 1 or None in stream:
        raise complaint(
            f"{len(own)} references for {record.get('name')} with seed {record.get('seed')}",
            "one joint run of the same class order, split and samples",
            "Run the method joint on that recipe and seed, and give each such run once.",
        )
    return {**record, "metrics": {**record["metrics"], metric: REFERENCED[metric](record, own[0])}}


def _stream_of(record: Record) -> tuple[Any, Any, Any]:
    return record.get("seed"), record.get("split_hash"), record.get("source", {}).get("hash")
