"""Recipes: all that decides the numbers of a run, in YAML. What is unknown, unread or impossible is an error."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from forgetcast.checks import complaint
from forgetcast.methods.registry import method_class
from forgetcast.runs.keys import did_you_mean, parse_assignment, parse_yaml
from forgetcast.runs.options import check_options

Share = Annotated[float, Field(ge=0, le=0.9)]
Count = Annotated[int, Field(ge=1)]
AtLeastZero = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """What all sections share: no unknown key, no value of another type, no change afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def refuse_set(self, section: str, keys: Sequence[str], reason: str) -> None:
        """Raise if one of `keys` differs from its default; `reason` says why nothing reads it."""
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise complaint(
                    f"got {section}.{key}={getattr(self, key)!r}",
                    f"no {key}, because {reason}",
                    f"Leave {section}.{key} out.",
                )


class Data(Section):
    """Where samples come from and how they become tasks.

    Attributes:
        source: name of a source, or path of an `.npz`.
        scenario: how the source becomes tasks.
        increment: new classes a task.
        base: classes of the first task; `increment` by default.
        test_share: share set aside for testing, where the source makes no split.
        validation_share: share of the training samples set aside for choosing.
        class_order: labels in order of appearance; drawn from the seed by default.
        online: whether every sample is seen once.
    """

    source: str
    scenario: Literal["class_incremental", "task_incremental", "domain_incremental"] = "class_incremental"
    increment: Count | None = None
    base: Count | None = None
    test_share: Annotated[float, Field(gt=0, le=0.9)] = 0.2
    validation_share: Share = 0.0
    class_order: tuple[int, ...] | None = None
    online: bool = False

    @model_validator(mode="after")
    def _possible(self) -> "Data":
        if self.scenario == "domain_incremental":
            reason = "domain_incremental has all classes in every task"
            self.refuse_set("data", ("increment", "base", "class_order"), reason)
        elif self.increment is None:
            raise complaint("no data.increment", f"the new classes a task of {self.scenario}", "Add data.increment.")
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


class ModelChoice(Section):
    """Backbone and head.

    Attributes:
        backbone: name of a backbone; `identity` takes the inputs as features.
        head: kind of head.
        new_rows: how the head's rows of new classes start.
    """

    backbone: str = "identity"
    head: Literal["linear", "cosine"] = "linear"
    new_rows: Literal["fresh", "placed"] = "fresh"


class MethodChoice(Section):
    """A method by its name; every other key is an option of its constructor."""

    model_config = ConfigDict(extra="allow")

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """What the constructor is given beyond the model and its protections."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> "MethodChoice":
        check_options(self.name, self.options)
        return self


class Training(Section):
    """How a method that learns by gradient is trained on each task."""

    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: AboveZero = 0.001
    epochs: Count = 1
    batch_size: Count = 64
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: AtLeastZero = 0.0
    schedule: Literal["constant", "cosine"] = "constant"

    @model_validator(mode="after")
    def _possible(self) -> "Training":
        if self.optimizer != "sgd":
            self.refuse_set("training", ("momentum",), f"{self.optimizer} has none to set; it belongs to sgd")
        return self


class Checkpoint(Section):
    """How often a run is saved, in minutes, and how many saved states are kept."""

    minutes: AboveZero = 10.0
    keep: Count = 2


class Recipe(Section):
    """All that decides the numbers of a run.

    Attributes:
        name: what its runs are called; the name of its file by default.
        seed: of class order, split, weights and batches.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: Data
    model: ModelChoice = ModelChoice()
    method: MethodChoice
    training: Training = Training()
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="after")
    def _possible(self) -> "Recipe":
        if self.data.online and self.training.epochs > 1:
            raise complaint(
                f"got training.epochs={self.training.epochs} with data.online=true",
                "one epoch, because an online stream shows each sample once",
                "Leave training.epochs out, or data.online.",
            )
        method = method_class(self.method.name)
        if method.by_gradient is False:
            unread = [key for key in Training.model_fields if key != "batch_size"]
            self.training.refuse_set("training", unread, f"{self.method.name} is a closed form")
        if "model" not in signature(method).parameters:
            self.model.refuse_set("model", ("head", "new_rows"), f"{self.method.name} brings its own head")
        return self

    def dump(self) -> dict[str, Any]:
        """The whole recipe, defaults included, as plain JSON values."""
        return self.model_dump(mode="json")

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides the numbers: neither the name nor the checkpoints."""
        deciding = {key: value for key, value in self.dump().items() if key not in ("name", "checkpoint")}
        return f"sha256:{hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()}"


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value` with dotted keys, each once; they win over the file.

    Raises:
        ValueError: no such file, no YAML, a key twice, unknown, unread or missing, a value that is of another type or
            impossible beside the others.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise complaint(f"cannot read {path} ({error})", "a recipe in YAML", "Correct the path.") from error
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise complaint(
            f"{path} holds a {type(tree).__name__}", f"the sections {list(Recipe.model_fields)}", "Name them."
        )
    overridden: set[str] = set()
    for override in overrides:
        key, value = parse_assignment(override)
        if key in overridden:
            raise complaint(f"got {key} twice in the overrides", "each key once", f"Leave one {key} out.")
        overridden.add(key)
        _set(tree, key, value)
    return build_recipe({"name": path.stem} | tree)


def build_recipe(tree: Mapping[str, Any]) -> Recipe:
    """A recipe of plain JSON values, such as `Recipe.dump` gives.

    Raises:
        ValueError: as `load_recipe`.
    """
    try:
        # By way of JSON, strict types take a list for a tuple, which is what YAML can say.
        return Recipe.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise _refusal(error) from error


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise complaint(
                f"got {key}={value!r}, and {section} is no section",
                "a key within a section",
                did_you_mean(key, _known_keys(Recipe)),
            )
    tree[last] = value


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _known_keys(field.annotation, f"{prefix}{name}.")


def _refusal(error: ValidationError) -> ValueError:
    """The first problem in the form of the house; an unknown key before what may be missing because of it."""
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in problem["loc"])
    given = f"got {key}={problem['input']!r}"
    expected = problem["msg"].removeprefix("Input should be ")
    match problem["type"]:
        case "value_error":
            own: ValueError = problem["ctx"]["error"]
            return own
        case "extra_forbidden":
            known = list(_known_keys(Recipe))
            section = key.rpartition(".")[0]
            own_keys = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
            where = f"one of {own_keys}" + (f" in {section}" if section else "")
            return complaint(f"nothing reads the key {key}", where, did_you_mean(key, known))
        case "missing":
            return complaint(f"no {key}", "a value, because there is no default", f"Add {key}.")
        case "literal_error":
            return complaint(given, expected, did_you_mean(str(problem["input"]), re.findall(r"'(\w+)'", expected)))
        case "string_pattern_mismatch":
            return complaint(given, "letters, digits, '.', '_' and '-', the first a letter or digit", f"Correct {key}.")
    return complaint(given, expected, f"Correct {key}.")
