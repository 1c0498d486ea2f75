"""Tasks and streams: which samples of a source train, validate and test each task, in which order."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from forgetcast.checks import complaint
from forgetcast.streams.sources import Source

Indices = Int[np.ndarray, " _"]


def no_samples() -> Indices:
    """No sample at all."""
    return np.array([], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Task:
    """One task: the classes it brings (as outputs of the head), and its samples (as indices into the source)."""

    classes: tuple[int, ...]
    train: Indices
    test: Indices
    validation: Indices = field(default_factory=no_samples)


@dataclass(frozen=True, eq=False)
class Stream:
    """Tasks in order over one source.

    Attributes:
        source: where the samples are.
        tasks: the tasks.
        class_order: the source's labels in order of appearance; output c of the head is `class_order[c]`.
        outputs: (n,) the output of each sample's class.
        seed: of class order and split.
        scenario: what reports call it.
        settings: what the scenario was asked for, in plain JSON values.
        task_incremental: whether a prediction may be restricted to the classes of the sample's own task.
        online: whether each training sample may be visited only once.

    Raises:
        ValueError: no task, or a task without training or without test samples.
    """

    source: Source
    tasks: tuple[Task, ...]
    class_order: tuple[int, ...]
    outputs: Indices
    seed: int
    scenario: str = "class-incremental"
    settings: Mapping[str, Any] = field(default_factory=dict)
    task_incremental: bool = False
    online: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            raise complaint(f"{self.source.name}: no task", "at least one task", "Give some classes or sources.")
        for index, task in enumerate(self.tasks):
            if min(len(task.train), len(task.test)) == 0:
                raise complaint(
                    f"task {index} has {len(task.train)} training and {len(task.test)} test samples",
                    "at least one of each",
                    "Give a split in which every class is on both sides.",
                )

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]

    @property
    def split_hash(self) -> str:
        """SHA-256 of scenario, settings, class order, and the classes and sample indices of every task."""
        record = {
            "scenario": self.scenario,
            "settings": dict(self.settings),
            "task_incremental": self.task_incremental,
            "online": self.online,
            "class_order": list(self.class_order),
            "tasks": [
                [list(task.classes), *(part.tolist() for part in (task.train, task.validation, task.test))]
                for task in self.tasks
            ],
        }
        return f"sha256:{hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()}"

    def outputs_after(self, index: int) -> int:
        """How many outputs a head needs once task `index` is learnt.

        In a blurry stream this is more than the classes brought so far: samples of later classes leak into earlier
        tasks.
        """
        seen = [int(self.outputs[task.train].max()) for task in self.tasks[: index + 1]]
        brought = [max(task.classes) for task in self.tasks[: index + 1]]
        return 1 + max(seen + brought)
