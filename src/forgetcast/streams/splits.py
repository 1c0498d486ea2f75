"""Splits into training, validation and test samples, each class on its own, all from one seed."""

import numpy as np
from sklearn.model_selection import train_test_split

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.streams.sources import Source
from forgetcast.streams.stream import Indices, no_samples


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose: another purpose draws independent ones from the same seed."""
    return np.random.default_rng([seed, *purpose.encode()])


def split(source: Source, *, test_share: float, validation_share: float, seed: int) -> tuple[Indices, Indices, Indices]:
    """Indices for training, validation and test, sorted and disjoint; together they are the whole source.

    Args:
        source: its own test split is kept, if it has one.
        test_share: share of each class that is set aside for testing, where the source makes no split.
        validation_share: share of each class's remaining samples (rounded, at least one) that is set aside for
            validation; 0 sets none aside.
        seed: of both.

    Raises:
        ValueError: shares out of range, a class that is too small.
    """
    require_integer("seed", seed)
    require_number("test_share", test_share, most=0.9, strict=True)
    require_number("validation_share", validation_share, most=0.9)
    everything = np.arange(len(source))
    if source.test is not None:
        train, test = np.setdiff1d(everything, source.test), np.sort(source.test)
    else:
        try:
            train, test = train_test_split(everything, test_size=test_share, random_state=seed, stratify=source.labels)
        except ValueError as error:
            raise complaint(
                f"{source.name}: cannot set a share of {test_share:g} of every class aside ({error})",
                "classes that are large enough for it",
                "Give another test_share, or a source with its own test split.",
            ) from None
    train, test = np.sort(train), np.sort(test)
    if validation_share == 0:
        return train, no_samples(), test
    draw, held_out = generator(seed, "validation"), []
    for label in np.unique(source.labels[train]):
        own = train[source.labels[train] == label]
        size = max(1, round(validation_share * len(own)))
        if size >= len(own):
            raise complaint(
                f"{source.name}: label {label} has {len(own)} samples for training and validation",
                f"more than the {size} that validation_share={validation_share:g} takes",
                "Lower validation_share, or drop that class.",
            )
        held_out.append(draw.choice(own, size, replace=False))
    validation = np.sort(np.concatenate(held_out)) if held_out else no_samples()
    return np.setdiff1d(train, validation), validation, test
