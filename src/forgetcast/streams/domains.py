"""Domain-incremental streams: the same classes in every task, each time from another source."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from forgetcast.checks import complaint
from forgetcast.streams.scenarios import labels_of
from forgetcast.streams.sources import Source
from forgetcast.streams.splits import split
from forgetcast.streams.stream import Stream, Task


def domain_incremental(
    sources: Sequence[Source],
    *,
    seed: int = 0,
    test_share: float = 0.2,
    validation_share: float = 0.0,
    online: bool = False,
) -> Stream:
    """Domain-incremental: every task has the same classes, each from a source of its own, in the given order.

    The stream's source holds all of them, one after the other. Outputs are in the order of the labels.

    Args:
        sources: one a domain, of one kind and shape, with the same labels.
        seed: of the stratified splits.
        test_share: share of each class that is set aside for testing, in each source that makes no split.
        validation_share: share of each class's other samples that is set aside for validation.
        online: whether each training sample may be visited only once.

    Raises:
        ValueError: fewer than two sources, sources that do not fit together, a class too small to split.
    """
    if len(sources) < 2:
        raise complaint(f"got {len(sources)} sources", "at least two, one a domain", "Give a list of sources.")
    labels = labels_of(sources[0])
    for source in sources[1:]:
        if labels_of(source) != labels or source.class_names != sources[0].class_names:
            raise complaint(
                f"{source.name} has the labels {labels_of(source)}, named {source.class_names}",
                f"those of {sources[0].name}: {labels}, named {sources[0].class_names}",
                "Number and name the classes alike in every domain.",
            )
    parts = [split(one, test_share=test_share, validation_share=validation_share, seed=seed) for one in sources]
    starts = np.cumsum([0, *(len(one) for one in sources)])
    classes = tuple(range(len(labels)))
    tasks = tuple(
        Task(classes, train + start, test + start, validation + start)
        for start, (train, validation, test) in zip(starts, parts, strict=False)
    )
    joined = joined_source(sources, np.concatenate([task.test for task in tasks]))
    return Stream(
        joined,
        tasks,
        tuple(labels),
        np.searchsorted(np.array(labels), joined.labels),
        seed,
        "domain-incremental",
        {"domains": [one.name for one in sources], "test_share": test_share, "validation_share": validation_share},
        online=online,
    )


def joined_source(sources: Sequence[Source], test: Int[np.ndarray, " _"]) -> Source:
    """All samples of several sources, one source after the other, with the given indices set aside for testing.

    Raises:
        ValueError: inputs of different kinds, shapes or types.
    """
    first = sources[0]
    for other in sources[1:]:
        alike = other.kind == first.kind and other.inputs.shape[1:] == first.inputs.shape[1:]
        if not alike or (other.inputs.dtype.kind in "OU") != (first.inputs.dtype.kind in "OU"):
            raise complaint(
                f"{other.name}: {other.kind} of shape {other.inputs.shape} and type {other.inputs.dtype}",
                f"{first.kind} as in {first.name}, of shape {first.inputs.shape} and type {first.inputs.dtype}",
                "Convert one of the two.",
            )
    inputs, labels = (np.concatenate([getattr(one, name) for one in sources]) for name in ("inputs", "labels"))
    return Source("+".join(one.name for one in sources), inputs, labels, test, first.kind, first.class_names)
