"""Sources from the `datasets` library: a hub name, a folder it saved, or a local CSV, JSON or Parquet file."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from forgetcast.checks import complaint
from forgetcast.streams.files import texts_array
from forgetcast.streams.sources import Kind, Source, numbered

BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def huggingface(
    name_or_path: str | Path,
    *,
    input: str,
    label: str,
    train: str = "train",
    test: str | None = "test",
    config: str | None = None,
) -> Source:
    """Two columns of a Hugging Face data set: texts, images (kept encoded, decoded when taken) or lists of numbers.

    Args:
        name_or_path: a hub name, a folder written by `save_to_disk`, or a local .csv, .json, .jsonl or .parquet file.
        input: the column of the inputs.
        label: the column of the labels: class labels, whole numbers, or names, which are numbered in sorted order.
        train: the split to train on.
        test: the split that is set aside for testing; None where there is none, so that a scenario makes one.
        config: the hub data set's configuration.

    Raises:
        ValueError: no such data set, an unknown split or column, inputs of another type, unlabelled samples.
    """
    parts = _load(name_or_path, config)
    wanted = [train] if test is None else [train, test]
    for split in wanted:
        if split not in parts:
            raise complaint(
                f"{name_or_path} has no split {split!r}", f"one of {sorted(parts)}", "Name another, or give test=None."
            )
    for column in (input, label):
        for split in wanted:
            if column not in parts[split].column_names:
                raise complaint(
                    f"{name_or_path} ({split}) has no {column!r}",
                    f"one of its columns: {parts[split].column_names}",
                    "Name another column.",
                )
    inputs, kinds = zip(*(_inputs(parts[split], input) for split in wanted), strict=True)
    values = [value for split in wanted for value in parts[split].with_format(None)[label]]
    labels, class_names = numbered(values)
    known = getattr(parts[train].features[label], "names", None)
    held_out = None if test is None else np.arange(len(inputs[0]), len(labels))
    names = class_names if known is None else tuple(known)
    return Source(Path(name_or_path).name, np.concatenate(inputs), labels, held_out, kinds[0], names)


def _load(name_or_path: str | Path, config: str | None) -> dict[str, Any]:
    """Splits by name."""
    from datasets import Dataset, load_dataset, load_from_disk

    path = Path(name_or_path)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = load_from_disk(path)
        elif path.is_file() and path.suffix.lower() in BUILDERS:
            loaded = load_dataset(BUILDERS[path.suffix.lower()], data_files=str(path))
        else:
            loaded = load_dataset(str(name_or_path), config)
    except (OSError, ValueError) as error:
        raise complaint(
            f"cannot load {name_or_path} ({error})",
            "a Hugging Face data set, a folder written by save_to_disk, or a .csv, .json, .jsonl or .parquet file",
            "Correct the name, or download it first where there is no network.",
        ) from error
    return {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)


def _inputs(part: Any, column: str) -> tuple[Shaped[np.ndarray, "..."], Kind]:
    from datasets import Image

    if isinstance(part.features[column], Image):
        encoded = part.with_format(None).cast_column(column, Image(decode=False))[column]
        return np.array([image["bytes"] or image["path"] for image in encoded], dtype=object), "images"
    values = list(part.with_format(None)[column])
    if all(isinstance(value, str) for value in values):
        return texts_array(values), "texts"
    try:
        return np.array(values, dtype=np.float32), "features"
    except (TypeError, ValueError) as error:
        raise complaint(
            f"column {column!r} of type {part.features[column]}",
            "texts, images, or lists of numbers of one length",
            "Name another column, or repair the missing values.",
        ) from error
