"""Sources by address: one line of text, as a recipe or the command line gives it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from forgetcast.checks import complaint, require_choice
from forgetcast.streams.files import image_folder, table
from forgetcast.streams.huggingface import huggingface
from forgetcast.streams.sources import Source, digits, npz


@dataclass(frozen=True)
class _Reader:
    read: Callable[..., Source]
    place: Callable[[str], Any] = Path
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


READERS = {
    "npz": _Reader(npz),
    "folder": _Reader(image_folder),
    "csv": _Reader(partial(table, layout="csv"), required=("text", "label"), optional=("split",)),
    "jsonl": _Reader(partial(table, layout="jsonl"), required=("text", "label"), optional=("split",)),
    "hf": _Reader(huggingface, str, required=("input", "label"), optional=("train", "test", "config")),
}


def source_from(address: str) -> Source:
    """The source that an address names.

    Args:
        address: `digits`, `npz:PATH`, `folder:PATH`, `csv:PATH?text=COLUMN&label=COLUMN`, `jsonl:...` likewise (both
            also `&split=COLUMN`), or `hf:NAME?input=COLUMN&label=COLUMN` (also `&train=`, `&test=`, `&config=`; an
            empty `test=` says that there is no test split). Names are written as in a URL: %26 is an ampersand.

    Raises:
        ValueError: an unknown kind of address, a missing or unknown option, or what the source itself complains about.
    """
    if address == "digits":
        return digits()
    kind, colon, rest = address.partition(":")
    if not colon or kind not in READERS:
        require_choice("source", kind if colon else address, ["digits", *(f"{known}:" for known in READERS)])
    reader = READERS[kind]
    place, _, query = rest.partition("?")
    options = {name: value or None for name, value in parse_qsl(query, keep_blank_values=True)}
    known = reader.required + reader.optional
    wrong = [name for name in options if name not in known]
    missing = [name for name in reader.required if not options.get(name)]
    if not place or wrong or missing:
        raise complaint(
            f"got source={address!r}",
            f"{kind}:PLACE" + ("?" + "&".join(f"{name}=..." for name in reader.required) if reader.required else ""),
            f"Unknown options: {wrong}; missing: {missing}; known: {list(known)}.",
        )
    return reader.read(reader.place(place), **options)
