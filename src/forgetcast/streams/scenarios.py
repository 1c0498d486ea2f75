"""Scenarios: how a source becomes a stream of tasks. Class order, split and seed are data on the stream."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from sklearn.model_selection import train_test_split

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.streams.sources import Source

Indices = Int[np.ndarray, " _"]


@dataclass(frozen=True, eq=False)
class Task:
    """One task: the classes it brings, and which samples of the source train and test it."""

    classes: tuple[int, ...]
    train: Indices
    test: Indices


@dataclass(frozen=True, eq=False)
class Stream:
    """Tasks in order over one source.

    Attributes:
        source: where the samples are.
        tasks: the tasks.
        class_order: the source's labels in order of appearance; output c of the head is `class_order[c]`.
        outputs: (n,) the output of each sample's class.
        seed: of class order and split.
    """

    source: Source
    tasks: tuple[Task, ...]
    class_order: tuple[int, ...]
    outputs: Indices
    seed: int

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]

    @property
    def split_hash(self) -> str:
        """SHA-256 of class order, classes and sample indices of every task."""
        record = [list(self.class_order)] + [
            [list(task.classes), task.train.tolist(), task.test.tolist()] for task in self.tasks
        ]
        return f"sha256:{hashlib.sha256(json.dumps(record).encode()).hexdigest()}"


def class_incremental(
    source: Source,
    increment: int,
    *,
    seed: int = 0,
    test_share: float = 0.2,
    class_order: Sequence[int] | None = None,
) -> Stream:
    """Class-incremental: each task brings `increment` new classes (the last may bring fewer).

    Args:
        source: the samples; its own test split is kept, if it has one.
        increment: classes a task.
        seed: of the class order and of the stratified split.
        test_share: share of each class that is set aside for testing, where the source makes no split.
        class_order: labels in order of appearance; drawn from the seed by default.

    Raises:
        ValueError: fewer than two classes, an order that is not one of the source's labels, a class too small to split.
    """
    require_integer("increment", increment, least=1)
    require_integer("seed", seed)
    require_number("test_share", test_share, most=0.9, strict=True)
    labels, counts = np.unique(source.labels, return_counts=True)
    if len(labels) < 2 or counts.min() < 2:
        raise complaint(
            f"{source.name}: {len(labels)} classes, the smallest of {counts.min()} samples",
            "at least two classes of at least two samples",
            "Merge or drop the small classes.",
        )
    order = list(np.random.default_rng(seed).permutation(labels)) if class_order is None else list(class_order)
    if sorted(order) != labels.tolist():
        raise complaint(
            f"got class_order={order}", f"every label of the source once: {labels.tolist()}", "Complete the order."
        )
    place = {int(label): output for output, label in enumerate(order)}
    outputs = np.array([place[int(label)] for label in source.labels], dtype=np.int64)
    train, test = _split(source, outputs, test_share, seed)
    tasks = []
    for start in range(0, len(order), increment):
        own = range(start, min(start + increment, len(order)))
        tasks.append(Task(tuple(own), *(part[np.isin(outputs[part], own)] for part in (train, test))))
    for index, task in enumerate(tasks):
        if min(len(task.train), len(task.test)) == 0:
            raise complaint(
                f"task {index} has {len(task.train)} training and {len(task.test)} test samples",
                "at least one of each",
                "Give a split in which every class is on both sides.",
            )
    return Stream(source, tuple(tasks), tuple(int(label) for label in order), outputs, seed)


def _split(source: Source, outputs: Indices, test_share: float, seed: int) -> tuple[Indices, Indices]:
    everything = np.arange(len(outputs))
    if source.test is not None:
        return np.setdiff1d(everything, source.test), source.test
    train, test = train_test_split(everything, test_size=test_share, random_state=seed, stratify=outputs)
    return np.sort(train), np.sort(test)
