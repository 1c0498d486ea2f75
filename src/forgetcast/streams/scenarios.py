"""Scenarios: how a source becomes a stream of tasks. Class order, split and seed are data on the stream."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from forgetcast.checks import complaint, require_choice, require_integer
from forgetcast.streams.sources import Source
from forgetcast.streams.splits import split
from forgetcast.streams.stream import Stream as Stream
from forgetcast.streams.stream import Task as Task


def class_incremental(
    source: Source,
    increment: int | None = None,
    *,
    base: int | None = None,
    groups: Sequence[Sequence[int | str]] | None = None,
    seed: int = 0,
    test_share: float = 0.2,
    validation_share: float = 0.0,
    class_order: Sequence[int] | None = None,
    task_incremental: bool = False,
    online: bool = False,
) -> Stream:
    """Class-incremental: each task brings new classes, `increment` of them or a given group.

    Args:
        source: the samples; its own test split is kept, if it has one.
        increment: classes a task (the last may bring fewer).
        base: classes of the first task; `increment` by default.
        groups: instead of the two: the labels, or the class names, of each task; together every class once.
        seed: of the class order and of the stratified split.
        test_share: share of each class that is set aside for testing, where the source makes no split.
        validation_share: share of each class's other samples that is set aside for validation.
        class_order: labels in order of appearance; drawn from the seed by default, or as in `groups`.
        task_incremental: whether a prediction may be restricted to the classes of the sample's own task.
        online: whether each training sample may be visited only once.

    Raises:
        ValueError: fewer than two classes, an order or groups that are not the source's labels once each, a class too
            small to split, both or neither of `increment` and `groups`.
    """
    labels = labels_of(source)
    if groups is not None:
        if increment is not None or base is not None or class_order is not None:
            raise complaint(
                "got groups together with increment, base or class_order", "groups alone", "Leave the others out."
            )
        parts = [[_label(source, value) for value in group] for group in groups]
        order = [label for part in parts for label in part]
        _require_each_once("groups", order, labels)
        sizes = [len(part) for part in parts]
        if 0 in sizes:
            raise complaint(f"group {sizes.index(0)} is empty", "at least one class a group", "Drop that group.")
        settings: dict[str, Any] = {"groups": parts}
    else:
        require_integer("increment", increment, least=1)
        assert increment is not None  # checked the line above
        if class_order is None:
            order = np.random.default_rng(seed).permutation(labels).tolist()
        else:
            order = [int(label) for label in class_order]
            _require_each_once("class_order", order, labels)
        sizes = _sizes(len(order), increment, base)
        settings = {"increment": increment} | ({} if base is None else {"base": base})
    place = {label: output for output, label in enumerate(order)}
    outputs = np.array([place[label] for label in source.labels.tolist()], dtype=np.int64)
    train, validation, test = split(source, test_share=test_share, validation_share=validation_share, seed=seed)
    tasks = []
    for start, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False):
        own = tuple(range(start, start + size))
        mine = [part[np.isin(outputs[part], own)] for part in (train, test, validation)]
        tasks.append(Task(own, *mine))
    return Stream(
        source,
        tuple(tasks),
        tuple(order),
        outputs,
        seed,
        "task-incremental" if task_incremental else "class-incremental",
        settings | {"test_share": test_share, "validation_share": validation_share},
        task_incremental,
        online,
    )


def labels_of(source: Source) -> list[int]:
    """The source's labels, sorted.

    Raises:
        ValueError: fewer than two classes, or a class of one sample.
    """
    labels, counts = np.unique(source.labels, return_counts=True)
    if len(labels) < 2 or counts.min() < 2:
        raise complaint(
            f"{source.name}: {len(labels)} classes, the smallest of {counts.min()} samples",
            "at least two classes of at least two samples",
            "Merge or drop the small classes.",
        )
    return [int(label) for label in labels]


def _label(source: Source, value: int | str) -> int:
    if isinstance(value, str):
        names = source.class_names or ()
        require_choice("class", value, names)
        return names.index(value)
    return int(value)


def _require_each_once(name: str, order: list[int], labels: list[int]) -> None:
    if sorted(order) != labels:
        unknown = sorted(set(order) - set(labels))
        missing = sorted(set(labels) - set(order))
        twice = sorted({label for label in order if order.count(label) > 1})
        raise complaint(
            f"got {name}={order}",
            f"every label of the source once: {labels}",
            f"Unknown: {unknown}; missing: {missing}; more than once: {twice}.",
        )


def _sizes(classes: int, increment: int, base: int | None) -> list[int]:
    first = increment if base is None else base
    require_integer("base", first, least=1)
    if base is not None and base > classes:
        raise complaint(f"got base={base}", f"at most the source's {classes} classes", "Lower base.")
    first = min(first, classes)
    starts = range(first, classes, increment)
    return [first, *(min(increment, classes - start) for start in starts)]
