"""The record of a run: everything that is needed to say what its numbers are, in one JSON file."""

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forgetcast.checks import complaint

SCHEMA = "forgetcast.record/1"


def provenance() -> dict[str, Any]:
    """Schema, time and versions: what every record starts with."""
    packages = ("forgetcast", "torch", "numpy", "scipy", "scikit-learn")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    return {"schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions}


def write_record(record: Mapping[str, Any], folder: Path) -> Path:
    """Write `record.json` into `folder`; the file appears whole or not at all.

    Raises:
        ValueError: a NaN or infinity in the record, which JSON cannot hold.
    """
    return write_whole(json.dumps(record, indent=1, allow_nan=False), folder / "record.json")


def write_whole(text: str, path: Path) -> Path:
    """Write a text file, which appears whole or not at all; what a kill leaves is written over the next time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    return part.replace(path)


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a run.

    Raises:
        ValueError: no record there, a damaged one, or one of another schema.
    """
    path = folder / "record.json" if folder.is_dir() else folder
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise complaint(
            f"cannot read the record {path} ({error})",
            "a folder with a record.json",
            "Finish that run first, or run `forgetcast demo`.",
        ) from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        given = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise complaint(f"{path} has schema {given!r}", repr(SCHEMA), "Write it again with this version.")
    return record
