"""Checkpoints that appear whole or not at all: safetensors for tensors, JSON for the rest, a checksum for both."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from forgetcast.checks import complaint, require_integer, require_number

TENSORS, VALUES, MANIFEST = "tensors.safetensors", "values.json", "manifest"
SCHEMA = "forgetcast.checkpoint/1"


@dataclass(frozen=True)
class Checkpointing:
    """When and where checkpoints are written; always at the end of a task.

    Args:
        folder: holds them.
        minutes: and after this many minutes within a task.
        steps: and after this many steps within a task, if given.
        keep: number of checkpoints that stay.
    """

    folder: Path
    minutes: float = 10.0
    steps: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        require_number("minutes", self.minutes)
        require_integer("keep", self.keep, least=1)
        if self.steps is not None:
            require_integer("steps", self.steps, least=1)


def save_checkpoint(folder: Path, number: int, state: Mapping[str, Any], *, owner: str, keep: int = 2) -> Path:
    """Write checkpoint `number` into `folder` and remove all but the newest `keep`.

    It is written beside its place, flushed to the disk, and renamed: a kill at any moment leaves the old ones whole.

    Args:
        folder: holds the checkpoints of one run.
        number: rises with every checkpoint.
        state: nested dicts, lists and tuples of tensors and plain JSON values.
        owner: what the checkpoint belongs to (the hash of a recipe); another owner cannot load it.
        keep: number of checkpoints that stay.

    Raises:
        ValueError: a value in `state` that neither safetensors nor JSON can hold.
    """
    require_integer("number", number)
    require_integer("keep", keep, least=1)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    values = _encode(state, "", tensors)
    files = {TENSORS: save(tensors), VALUES: json.dumps(values).encode()}
    manifest = {
        "schema": SCHEMA,
        "number": number,
        "owner": owner,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    part, place = folder / f".part-{number:09d}", folder / f"{number:09d}"
    for old in folder.glob(".part-*"):
        shutil.rmtree(old)
    part.mkdir()
    listing = json.dumps(manifest).encode()
    sealed = hashlib.sha256(listing).hexdigest().encode() + b"\n" + listing
    for name, content in (files | {MANIFEST: sealed}).items():
        _write(part / name, content)
    if place.exists():
        shutil.rmtree(place)
    os.rename(part, place)  # noqa: PTH104
    _flush_folder(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return place


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, damaged ones included."""
    return sorted(path for path in folder.glob("[0-9]" * 9) if path.is_dir())


def load_checkpoint(
    folder: Path, *, owner: str | None, wanted: Callable[[Mapping[str, Any]], bool] = lambda _: True
) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint that is whole and wanted: its number and state. None where there is none.

    A damaged one is passed over with a warning.

    Args:
        folder: holds the checkpoints of one run.
        owner: what they belong to; None takes those of anyone, to be looked at and not gone on with.
        wanted: whether a state will do.

    Raises:
        ValueError: a checkpoint of another owner; only damaged ones.
    """
    found, whole = checkpoints(folder), 0
    for path in reversed(found):
        try:
            number, state = _read(path, owner)
        except _DamagedError as error:
            warnings.warn(f"{path} is damaged ({error}): the checkpoint before it is taken instead", stacklevel=2)
            continue
        if wanted(state):
            return number, state
        whole += 1
    if found and not whole:
        raise complaint(
            f"all {len(found)} checkpoints in {folder} are damaged",
            "at least one whole checkpoint",
            "Remove that folder to start again, or restore it from a copy.",
        )
    return None


class _DamagedError(Exception):
    pass


def _read(path: Path, owner: str | None) -> tuple[int, dict[str, Any]]:
    try:
        seal, listing = (path / MANIFEST).read_bytes().split(b"\n", 1)
        if hashlib.sha256(listing).hexdigest().encode() != seal:
            raise _DamagedError(f"the checksum of {MANIFEST} does not match")
        manifest = json.loads(listing)
        files = {name: (path / name).read_bytes() for name in (TENSORS, VALUES)}
        expected = {name: manifest["sha256"][name] for name in files}
        known = manifest["schema"] == SCHEMA
        theirs, number = manifest["owner"], int(manifest["number"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{type(error).__name__}: {error}") from error
    if not known or owner not in (None, theirs):
        raise complaint(
            f"{path} belongs to {theirs} ({manifest['schema']})",
            f"a checkpoint of {owner or 'any run'} ({SCHEMA})",
            "Give another folder, or run the recipe that it belongs to.",
        )
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != expected[name]:
            raise _DamagedError(f"the checksum of {name} does not match")
    try:
        state: dict[str, Any] = _decode(json.loads(files[VALUES]), load(files[TENSORS]))
    except (ValueError, KeyError, SafetensorError) as error:
        raise _DamagedError(f"{type(error).__name__}: {error}") from error
    return number, state


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON values with tensors, tuples and non-string keys replaced by tagged objects."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{path}"  # the number keeps "a/b" apart from "b" within "a"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[_key(key, path), _encode(own, f"{path}/{key}", tensors)] for key, own in value.items()]}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(own, f"{path}/{i}", tensors) for i, own in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise complaint(
        f"the state holds a {type(value).__name__} at {path or 'its root'}",
        "tensors and plain JSON values in dicts, lists and tuples",
        "Turn it into one of these in state_dict, and back in load_state_dict.",
    )


def _key(key: Any, path: str) -> Any:
    if not isinstance(key, str | int):
        raise complaint(f"the state has the key {key!r} at {path}", "keys of text or integers", "Use another key.")
    return key


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: _decode(own, tensors) for key, own in content}
    own = [_decode(item, tensors) for item in content]
    return tuple(own) if kind == "tuple" else own


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
