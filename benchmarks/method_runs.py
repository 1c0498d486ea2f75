"""One run of a row, and what has been measured so far."""

import json
import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import numpy as np
import torch

from benchmarks.method_rows import Choice, Row, Setting
from forgetcast.learn.cost import stored_numbers
from forgetcast.learn.loop import learn
from forgetcast.learn.progress import Learnt
from forgetcast.learn.seeding import seed_everything
from forgetcast.methods.base import Method
from forgetcast.methods.registry import create
from forgetcast.metrics.matrix import all_metrics
from forgetcast.modes import evaluating
from forgetcast.protect.placement import Placement
from forgetcast.streams.stream import Stream, Task

Table = dict[str, Any]


class Store:
    """What has been measured, on disk after each measurement, so that an interrupted table goes on where it was.

    Args:
        path: of the JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: Table = json.loads(path.read_text()) if path.exists() else {}

    def kept(self, place: Table, key: str, identity: Any, work: Callable[[], Mapping[str, Any]]) -> Table:
        """The measurement `key` of `place`: as it stands where it was made with the same identity, else made now."""
        identity = json.loads(json.dumps(identity))
        if place.get(key, {}).get("identity") != identity:
            started = process_time()
            measured = work()
            place[key] = {"identity": identity, **measured, "cpu_seconds": process_time() - started}
            self.save()
        found: Table = place[key]
        return found

    def save(self) -> None:
        """The whole file or the old one; a list of numbers is one line."""
        text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), json.dumps(self.all, indent=1))
        part = self.path.with_suffix(".part")
        part.write_text(text + "\n")
        part.replace(self.path)


def identity_of(setting: Setting, row: Row, choice: Choice, stream: Stream) -> dict[str, Any]:
    """All that decides the numbers of a run, but for the code."""
    optimization = asdict(setting.optimization_of(row, choice))
    data = {"source": setting.source.hash, "split": stream.split_hash}
    return {"row": asdict(row), "choice": choice, "optimization": optimization, **data}


def trained(setting: Setting, row: Row, choice: Choice, stream: Stream) -> dict[str, Any]:
    """A row at the stream's seed, with all that the table tells of it."""
    started = process_time()
    if row.ceiling:
        ends = [_from_scratch(setting, row, choice, stage) for stage in _stages(stream)]
        matrix = [_by_task(stream, count + 1, done) for count, (_, done) in enumerate(ends)]
        method, done = ends[-1]
    else:
        method, done = _from_scratch(setting, row, choice, stream)
        matrix = done.accuracy_matrix
    return {
        "class_order": list(stream.class_order),
        "metrics": all_metrics(matrix),
        "task_incremental_last_accuracy": None if row.ceiling else fmean(done.task_incremental_matrix[-1]),
        "accuracy_matrix": matrix,
        "right": _right(setting, method, stream),
        "stored_numbers": stored_numbers(method.state_dict()),
        "trainable_parameters": done.trainable_parameters[0 if row.options.get("first_session") else -1],
        "seconds": process_time() - started,
    }


def last_accuracy(setting: Setting, row: Row, choice: Choice, stream: Stream) -> float:
    """After the last task; the ceiling needs its last stage alone."""
    if not row.ceiling:
        return all_metrics(_from_scratch(setting, row, choice, stream)[1].accuracy_matrix)["last_accuracy"]
    return fmean(_by_task(stream, len(stream), _from_scratch(setting, row, choice, _stages(stream)[-1])[1]))


def _from_scratch(setting: Setting, row: Row, choice: Choice, stream: Stream) -> tuple[Method, Learnt]:
    seed_everything(stream.seed)
    method = create(row.method, *setting.network(row, choice), **row.options_with(choice))
    if row.whole_head:
        method.model.head.grow(len(stream.class_order))  # type: ignore[operator]
    if row.placed:
        method.protections = (Placement(), *method.protections)
    return method, learn(method, stream, setting.optimization_of(row, choice), seed=stream.seed)


def _stages(stream: Stream) -> list[Stream]:
    """For each task a stream of one: its classes and those of all before it."""
    stages = []
    for count in range(1, len(stream.tasks) + 1):
        parts = stream.tasks[:count]
        classes = tuple(output for task in parts for output in task.classes)
        train, test = (np.concatenate([getattr(task, name) for task in parts]) for name in ("train", "test"))
        stages.append(replace(stream, tasks=(Task(classes, train, test),)))
    return stages


def _right(setting: Setting, method: Method, stream: Stream) -> str:
    """Which test samples of the source are answered right after the last task: bits in base64."""
    test = np.sort(np.concatenate([task.test for task in stream.tasks]))
    inputs = torch.from_numpy(setting.source.inputs[test])
    with torch.no_grad(), evaluating(method.model):
        answers = torch.cat([method.predict(part).argmax(1) for part in inputs.split(256)])
    return b64encode(np.packbits(answers.numpy() == stream.outputs[test]).tobytes()).decode()


def _by_task(stream: Stream, count: int, done: Learnt) -> list[float]:
    """Accuracies on the first `count` tasks of the stream from those of the classes."""
    known = done.per_class_accuracy[-1]
    return [fmean(known[label] or 0.0 for label in stream.outputs[task.test]) for task in stream.tasks[:count]]
