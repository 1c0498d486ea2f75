"""Sources by kind, place and options, or by address: all of these in one line of text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl

from forgetcast.checks import complaint, require_choice
from forgetcast.streams.files import image_folder, table
from forgetcast.streams.huggingface import huggingface
from forgetcast.streams.sources import Source, digit_images, digits, npz


@dataclass(frozen=True)
class Reader:
    """How sources of one kind are read.

    Attributes:
        read: called with the place, if there is one, and the options by name.
        place: what the place is: a "path", a "name", or nothing.
        required: options that must be given.
        optional: options that may be given.
    """

    read: Callable[..., Source]
    place: Literal["path", "name"] | None = "path"
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


READERS = {
    "digits": Reader(digits, None),
    "digit_images": Reader(digit_images, None),
    "npz": Reader(npz),
    "folder": Reader(image_folder),
    "csv": Reader(partial(table, layout="csv"), required=("text", "label"), optional=("split",)),
    "jsonl": Reader(partial(table, layout="jsonl"), required=("text", "label"), optional=("split",)),
    "hf": Reader(huggingface, "name", required=("input", "label"), optional=("train", "test", "config")),
}


def read_source(kind: str, place: str | None, options: Mapping[str, str | None]) -> Source:
    """A source of one of the kinds in `READERS`.

    Raises:
        ValueError: an unknown kind, or what the source itself complains about.
    """
    require_choice("source", kind, READERS)
    reader = READERS[kind]
    if place is None:
        return reader.read(**options)
    return reader.read(Path(place) if reader.place == "path" else place, **options)


def source_from(address: str) -> Source:
    """The source that an address names.

    Args:
        address: `digits`, `digit_images`, `npz:PATH`, `folder:PATH`, `csv:PATH?text=COLUMN&label=COLUMN`, `jsonl:...`
            likewise (both also `&split=COLUMN`), or `hf:NAME?input=COLUMN&label=COLUMN` (also `&train=`, `&test=`,
            `&config=`; an empty `test=` says that there is no test split). Names are written as in a URL: %26 is an
            ampersand.

    Raises:
        ValueError: an unknown kind of address, a missing or unknown option, or what the source itself complains about.
    """
    return read_source(*parse_address(address))


def parse_address(address: str) -> tuple[str, str | None, dict[str, str | None]]:
    """Kind, place and options of an address.

    Raises:
        ValueError: an unknown kind of address, a missing or unknown option.
    """
    kind, colon, rest = address.partition(":")
    if kind not in READERS or (READERS[kind].place is None) == bool(colon):
        kinds = [name if reader.place is None else f"{name}:" for name, reader in READERS.items()]
        require_choice("source", f"{kind}:" if colon else address, kinds)
    reader = READERS[kind]
    if reader.place is None:
        return kind, None, {}
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
    return kind, place, options
