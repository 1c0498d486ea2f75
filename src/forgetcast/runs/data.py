"""The section `data` of a recipe: where samples come from, and how they become tasks."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from forgetcast.checks import complaint
from forgetcast.runs.keys import did_you_mean
from forgetcast.runs.section import Count, Probability, Section, Share
from forgetcast.streams.addresses import READERS, parse_address, read_source
from forgetcast.streams.domains import domain_incremental
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import Source
from forgetcast.streams.stream import Stream
from forgetcast.streams.variants import blurry, few_shot, long_tailed

Address = str | dict[str, Any]
Scenario = Literal["class_incremental", "task_incremental", "domain_incremental", "few_shot"]

_BY_CLASS = ("increment", "base", "groups", "class_order", "online", "long_tailed", "blurry")
READS: dict[str, tuple[str, ...]] = {
    "class_incremental": _BY_CLASS,
    "task_incremental": _BY_CLASS,
    "domain_incremental": ("online", "long_tailed"),
    "few_shot": ("base", "ways", "shots", "class_order"),
}


class LongTailed(Section):
    """Classes of exponentially falling size; keys as the arguments of `long_tailed`."""

    imbalance: Annotated[float, Field(ge=1)] = 100.0
    ordered: bool = True


class Blurry(Section):
    """Samples that leak into other tasks; keys as the arguments of `blurry`."""

    share: Annotated[float, Field(gt=0, le=1)]
    disjoint: Probability = 0.0


def _check_sources(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        _understood(value, "data.source")
        return value
    for index, one in enumerate(value):
        _understood(one, f"data.source.{index}")
    return tuple(value)  # a list is what YAML can say


class Data(Section):
    """Where samples come from and how they become tasks.

    Attributes:
        source: `digits`, `digit_images`, an address (`npz:PATH`), or the keys of one: `kind`, `path` (for `hf`:
            `name`), and options such as the columns of a table. For domain_incremental a list of them, one a domain.
        scenario: how the source becomes tasks.
        increment: new classes a task.
        base: classes of the first task; `increment` by default.
        groups: instead of the two: the labels or names of each task's classes.
        ways: new classes a later task (few_shot).
        shots: training samples of each of them (few_shot).
        class_order: labels in order of appearance; drawn from the seed by default.
        online: whether every sample is seen once.
        long_tailed: training samples thinned to a long tail.
        blurry: training samples moved to other tasks, after the thinning.
        test_share: share set aside for testing, where the source makes no split.
        validation_share: share of the training samples set aside for choosing.
    """

    source: Annotated[Address | tuple[Address, ...], BeforeValidator(_check_sources)]
    scenario: Scenario = "class_incremental"
    increment: Count | None = None
    base: Count | None = None
    groups: tuple[tuple[int | str, ...], ...] | None = None
    ways: Count | None = None
    shots: Count | None = None
    class_order: tuple[int, ...] | None = None
    online: bool = False
    long_tailed: LongTailed | None = None
    blurry: Blurry | None = None
    test_share: Annotated[float, Field(gt=0, le=0.9)] = 0.2
    validation_share: Share = 0.0

    @property
    def sources(self) -> tuple[Address, ...]:
        """All of them, in order."""
        return self.source if isinstance(self.source, tuple) else (self.source,)

    @model_validator(mode="after")
    def _possible(self) -> "Data":
        own = READS[self.scenario]
        others = [key for keys in READS.values() for key in keys if key not in own]
        self.refuse_set("data", others, f"{self.scenario} reads {', '.join(own)} alone")
        several = isinstance(self.source, tuple)
        if several != (self.scenario == "domain_incremental"):
            raise complaint(
                f"got data.source={list(self.source) if several else self.source!r} with {self.scenario}",
                "one source" if several else "a list of sources, one a domain",
                "Choose domain_incremental, or one source." if several else "Write data.source: [FIRST, SECOND].",
            )
        if self.scenario == "few_shot":
            self.require_set("data", ("base", "ways", "shots"), "few_shot has no default for it")
        elif "increment" in own and self.groups is not None:
            self.refuse_set("data", ("increment", "base", "class_order"), "groups say which task has which classes")
        elif "increment" in own and self.increment is None:
            raise complaint(
                "no data.increment", f"the new classes a task of {self.scenario}", "Add data.increment, or data.groups."
            )
        if self.test_share + self.validation_share >= 1:
            raise complaint(
                f"got data.test_share={self.test_share} and data.validation_share={self.validation_share}",
                "a sum below 1",
                "Lower one of them, so that samples are left to train on.",
            )
        order = self.class_order
        if order is not None and len(set(order)) != len(order):
            raise complaint(f"got data.class_order={list(order)}", "each label once", "Correct data.class_order.")
        return self


def stream_of(data: Data, seed: int) -> Stream:
    """The stream that the section describes.

    Args:
        data: the section.
        seed: of class order, split, and all that scenarios draw.

    Raises:
        ValueError: a share for testing where the sources make their own split, and whatever source and scenario refuse.
    """
    sources = [read_source(*_understood(address, "data.source")) for address in data.sources]
    if all(source.test is not None for source in sources):
        data.refuse_set("data", ("test_share",), f"{sources[0].name} has test samples of its own")
    shares = {"seed": seed, "test_share": data.test_share, "validation_share": data.validation_share}
    stream = _scenario(data, sources, shares)
    if data.long_tailed is not None:
        stream = long_tailed(stream, imbalance=data.long_tailed.imbalance, ordered=data.long_tailed.ordered)
    if data.blurry is not None:
        stream = blurry(stream, data.blurry.share, disjoint=data.blurry.disjoint)
    return stream


def _scenario(data: Data, sources: list[Source], shares: Mapping[str, Any]) -> Stream:
    if data.scenario == "domain_incremental":
        return domain_incremental(sources, online=data.online, **shares)
    if data.scenario == "few_shot":
        sizes = {key: getattr(data, key) for key in ("base", "ways", "shots")}
        return few_shot(sources[0], class_order=data.class_order, **sizes, **shares)
    return class_incremental(
        sources[0],
        data.increment,
        base=data.base,
        groups=data.groups,
        class_order=data.class_order,
        task_incremental=data.scenario == "task_incremental",
        online=data.online,
        **shares,
    )


def _understood(address: Any, key: str) -> tuple[str, str | None, dict[str, str | None]]:
    """Kind, place and options of a source, as an address or as keys say them."""
    if isinstance(address, str):
        return parse_address(address)
    if not isinstance(address, Mapping) or "kind" not in address:
        raise complaint(
            f"got {key}={address!r}",
            "digits, an address such as npz:PATH, or keys with a kind",
            f"Write for example {key}: digits.",
        )
    kind = address["kind"]
    if kind not in READERS:
        raise complaint(f"got {key}.kind={kind!r}", f"one of {list(READERS)}", did_you_mean(str(kind), READERS))
    reader = READERS[kind]
    required = (() if reader.place is None else (reader.place,)) + reader.required
    known = ("kind", *required, *reader.optional)
    for name, value in address.items():
        if name not in known:
            raise complaint(
                f"nothing reads the key {key}.{name}",
                f"one of {list(known)} for {kind}",
                did_you_mean(f"{key}.{name}", [f"{key}.{one}" for one in known]),
            )
        if not isinstance(value, str) and not (value is None and name in reader.optional):
            raise complaint(f"got {key}.{name}={value!r}", "text", f"Put quotes around {key}.{name}, or correct it.")
    for name in required:
        if not address.get(name):
            raise complaint(f"no {key}.{name}", f"a value, because {kind} has no default for it", f"Add {key}.{name}.")
    place = None if reader.place is None else str(address[reader.place])
    options = {name: value for name, value in address.items() if name not in ("kind", reader.place)}
    return str(kind), place, options
