"""Streams made harder: few shots, classes of very different sizes, samples that leak into other tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import Source
from forgetcast.streams.splits import generator
from forgetcast.streams.stream import Stream, no_samples


def few_shot(
    source: Source,
    *,
    base: int,
    ways: int,
    shots: int,
    seed: int = 0,
    test_share: float = 0.2,
    validation_share: float = 0.0,
    class_order: Sequence[int] | None = None,
) -> Stream:
    """Few-shot class-incremental: a base session, then tasks of `ways` new classes with `shots` samples each.

    The other training samples of the later classes are left out; test samples stay all.

    Args:
        source: the samples; its own test split is kept, if it has one.
        base: classes of the first task, which keeps all its training samples.
        ways: new classes in each later task.
        shots: training samples of each of them.
        seed: of the class order, of the stratified split and of the shots.
        test_share: share of each class that is set aside for testing, where the source makes no split.
        validation_share: share of each class's other samples that is set aside for validation.
        class_order: labels in order of appearance; drawn from the seed by default.

    Raises:
        ValueError: later classes that `ways` does not divide, a class with fewer than `shots` training samples.
    """
    require_integer("shots", shots, least=1)
    stream = class_incremental(
        source,
        ways,
        base=base,
        seed=seed,
        test_share=test_share,
        validation_share=validation_share,
        class_order=class_order,
    )
    later = len(stream.class_order) - base
    if later == 0 or later % ways:
        raise complaint(
            f"got base={base}, ways={ways} with {len(stream.class_order)} classes",
            f"some later classes, in whole tasks of {ways}",
            "Change base or ways.",
        )
    counts = {output: shots for task in stream.tasks[1:] for output in task.classes}
    return replace(
        thinned(stream, counts, "few-shot"),
        scenario="few-shot class-incremental",
        settings={**stream.settings, "ways": ways, "shots": shots},
    )


def long_tailed(stream: Stream, *, imbalance: float = 100.0, ordered: bool = True) -> Stream:
    r"""The stream with exponentially falling numbers of training samples; validation and test samples stay all.

        n_c = floor(n * imbalance**(-c / (classes - 1))),   n = training samples of the smallest class

    Args:
        stream: a stream; its seed draws the samples that stay.
        imbalance: the largest class over the smallest, at least 1.
        ordered: whether sizes fall along the class order; otherwise the seed deals the same sizes out to the classes.

    Raises:
        ValueError: an imbalance that leaves a class, or a task, without samples.

    Source: exponential profile of Cui et al., arXiv 1901.05555; ordered and shuffled streams of Liu et al.,
    arXiv 2210.00266.
    """
    require_number("imbalance", imbalance, least=1.0)
    classes = len(stream.class_order)
    train = np.concatenate([task.train for task in stream.tasks])
    most = int(np.bincount(stream.outputs[train], minlength=classes).min())
    # The small number keeps a size such as 32 * 32**-0.4 = 8 from falling to 7 by rounding.
    sizes = np.floor(most * imbalance ** (-np.arange(classes) / (classes - 1)) + 1e-9).astype(np.int64)
    if sizes.min() == 0:
        raise complaint(
            f"got imbalance={imbalance:g} where the smallest class has {most} training samples",
            f"at most {most}",
            "Lower imbalance.",
        )
    if not ordered:
        sizes = generator(stream.seed, "class sizes").permutation(sizes)
    return replace(
        thinned(stream, dict(enumerate(sizes.tolist())), "long-tailed"),
        scenario=f"long-tailed {stream.scenario}",
        settings={**stream.settings, "imbalance": float(imbalance), "ordered": ordered},
    )


def blurry(stream: Stream, share: float, *, disjoint: float = 0.0) -> Stream:
    """The stream with a share of each class's training samples moved to other tasks, evenly at random.

    Of a class with n training samples, `round(share * n)` move. `Task.classes`, validation and test samples stay.

    Args:
        stream: a stream in which each class belongs to one task; its seed draws the samples and where they go.
        share: share of each class's training samples that leaks, above 0 and below 1.
        disjoint: share of the classes (rounded, drawn by the seed) of which no sample leaks.

    Raises:
        ValueError: one task only, tasks that share classes, a task that would be left without samples.

    Source: Si-Blurry, arXiv 2308.09303. There the leaking samples are shuffled over all tasks, so some come back; here
    every one goes to another task, so that the declared share is the measured one.
    """
    require_number("share", share, most=1.0, strict=True)
    require_number("disjoint", disjoint, most=1.0)
    brought = [output for task in stream.tasks for output in task.classes]
    if len(stream) < 2 or len(set(brought)) != len(brought):
        raise complaint(
            f"a {stream.scenario} stream of {len(stream)} tasks",
            "at least two tasks, each class in one of them",
            "Start from class_incremental.",
        )
    draw = generator(stream.seed, "blurry")
    kept = set(draw.permutation(len(brought))[: round(disjoint * len(brought))].tolist())
    home = np.empty(len(stream.source), dtype=np.int64)  # the task that each training sample goes to
    train = np.sort(np.concatenate([task.train for task in stream.tasks]))
    for index, task in enumerate(stream.tasks):
        home[task.train] = index
        for output in task.classes:
            if output not in kept:
                own = task.train[stream.outputs[task.train] == output]
                leaking = draw.permutation(own)[: round(share * len(own))]
                others = draw.integers(len(stream) - 1, size=len(leaking))
                home[leaking] = others + (others >= index)
    return replace(
        stream,
        tasks=tuple(replace(task, train=train[home[train] == index]) for index, task in enumerate(stream.tasks)),
        scenario=f"blurry {stream.scenario}",
        settings={**stream.settings, "blurry_share": float(share), "disjoint_share": float(disjoint)},
    )


def thinned(stream: Stream, counts: Mapping[int, int], purpose: str) -> Stream:
    """The stream with `counts[c]` training samples of output c, drawn by the stream's seed; other classes keep all.

    Raises:
        ValueError: a class with fewer training samples.
    """
    draw = generator(stream.seed, purpose)
    train = np.concatenate([task.train for task in stream.tasks])
    dropped = [no_samples()]
    for output, count in sorted(counts.items()):
        own = train[stream.outputs[train] == output]
        if len(own) < count:
            raise complaint(
                f"label {stream.class_order[output]} has {len(own)} training samples",
                f"at least {count}",
                "Ask for fewer, or drop that class.",
            )
        dropped.append(draw.permutation(own)[count:])
    gone = np.concatenate(dropped)
    return replace(stream, tasks=tuple(replace(task, train=np.setdiff1d(task.train, gone)) for task in stream.tasks))
