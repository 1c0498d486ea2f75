"""Sources on disk: a folder of images with one sub-folder a class, and tables of texts (CSV, JSON lines)."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Shaped

from forgetcast.checks import complaint, require_choice
from forgetcast.streams.sources import Source, numbered

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def image_folder(path: Path) -> Source:
    """Images in one sub-folder a class, or in such sub-folders of `train/` and `test/`.

    Classes and files are in sorted order. Images are read when they are taken; their sizes may differ.

    Raises:
        ValueError: no such folder, no classes in it, a class without images.
    """
    if not (path / "train").is_dir():
        files, names = _class_files(path)
        test = None
    else:
        files, names = _class_files(path / "train")
        test = np.array([], dtype=np.int64)
        if (path / "test").is_dir():
            held_out, held_out_names = _class_files(path / "test")
            test = np.arange(len(files), len(files) + len(held_out))
            files, names = files + held_out, names + held_out_names
    class_names = tuple(sorted(set(names)))
    labels = np.searchsorted(np.array(class_names), np.array(names))
    return Source(
        path.name, texts_array(files), labels, test if test is None or len(test) else None, "images", class_names
    )


def table(
    path: Path,
    *,
    text: str,
    label: str,
    split: str | None = None,
    layout: Literal["csv", "jsonl"] | None = None,
) -> Source:
    """Texts and labels in two columns of a CSV file with a header, or in two fields of a file of JSON lines.

    Args:
        path: the file.
        text: the column of the texts.
        label: the column of the labels: whole numbers, or names, which are numbered in sorted order.
        split: the column that says "train" or "test" of each row, if there is one.
        layout: how the file is written; by default its suffix says so (.jsonl, .json and .ndjson are JSON lines).

    Raises:
        ValueError: a file that cannot be read, an unknown column, a text or label that is missing, another split.
    """
    if layout is None:
        layout = "jsonl" if path.suffix.lower() in (".jsonl", ".json", ".ndjson") else "csv"
    require_choice("layout", layout, ("csv", "jsonl"))
    wanted = [text, label] + ([] if split is None else [split])
    columns = _csv_columns(path, wanted) if layout == "csv" else _json_columns(path, wanted)
    for row, value in enumerate(columns[text]):
        if not isinstance(value, str):
            raise complaint(f"{path}: {text}={value!r} in sample {row}", "a text", "Repair or drop that sample.")
    test = None
    if split is not None:
        unknown = set(columns[split]) - {"train", "test"}
        if unknown:
            raise complaint(
                f"{path}: {split} holds {sorted(map(str, unknown))}", "only 'train' and 'test'", "Rename or drop them."
            )
        test = np.flatnonzero(np.array(columns[split]) == "test")
    labels, class_names = numbered(columns[label])
    return Source(path.stem, texts_array(columns[text]), labels, test, "texts", class_names)


def texts_array(texts: list[str]) -> Shaped[np.ndarray, " _"]:
    """(n,) array of Python strings; numpy's own string type would give every text the room of the longest."""
    return np.array(texts, dtype=object)


def _class_files(folder: Path) -> tuple[list[str], list[str]]:
    """Image files and their classes' names."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []
    if not classes:
        raise complaint(
            f"{folder} has no sub-folders", "a folder with one sub-folder of images a class", "Correct the path."
        )
    files: list[str] = []
    names: list[str] = []
    for one in classes:
        own = sorted(str(p) for p in one.iterdir() if p.suffix.lower() in SUFFIXES)
        if not own:
            raise complaint(
                f"{one} holds no images", f"files ending in {', '.join(SUFFIXES)}", "Fill or remove the folder."
            )
        files += own
        names += [one.name] * len(own)
    return files, names


def _csv_columns(path: Path, wanted: list[str]) -> dict[str, list[Any]]:
    try:
        # Without na_filter=False the text "None" or "NA" would be read as missing.
        frame = pd.read_csv(path, dtype=str, na_filter=False)
    except (OSError, ValueError) as error:
        raise complaint(
            f"cannot read {path} ({error})", "a CSV file with a header, in UTF-8", "Correct the path or the file."
        ) from error
    _require_columns(path, wanted, [str(name) for name in frame.columns])
    return {name: frame[name].tolist() for name in wanted}


def _json_columns(path: Path, wanted: list[str]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    fields = json.loads(line)
                    _require_columns(path, wanted, list(fields) if isinstance(fields, dict) else [])
                    for name in wanted:
                        columns[name].append(fields[name])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise complaint(
            f"cannot read {path} ({error})", "one JSON object a line, in UTF-8", "Correct the path or the file."
        ) from error
    return columns


def _require_columns(path: Path, wanted: list[str], known: list[str]) -> None:
    missing = [name for name in wanted if name not in known]
    if missing:
        raise complaint(f"{path} has no {missing[0]!r}", f"one of its columns: {known}", "Name another column.")
