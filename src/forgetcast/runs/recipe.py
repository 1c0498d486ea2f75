"""Recipes: all that decides the numbers of a run, in YAML. What is unknown, unread or impossible is an error."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from forgetcast.checks import complaint
from forgetcast.methods.registry import needs_blocks, needs_tuner, takes_steps
from forgetcast.runs.data import Data
from forgetcast.runs.expected import Expectation
from forgetcast.runs.keys import did_you_mean, parse_assignment, parse_yaml
from forgetcast.runs.options import takes_model
from forgetcast.runs.section import Section
from forgetcast.runs.sections import (
    AUGMENTATIONS,
    TRANSFORMERS,
    Checkpoint,
    MethodChoice,
    ModelChoice,
    PreprocessingChoice,
)
from forgetcast.runs.sections import Training as Training

# What says how a run is called, saved and judged, and not what its numbers are.
NOT_DECIDING = ("name", "checkpoint", "trackers", "expected")


class Recipe(Section):
    """All that decides the numbers of a run, and what they are expected to be.

    Attributes:
        name: what its runs are called; the name of its file by default.
        seed: of class order, split, weights and batches.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: Data
    model: ModelChoice = ModelChoice()
    preprocessing: PreprocessingChoice = PreprocessingChoice()
    method: MethodChoice
    training: Training = Training()
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint: Checkpoint = Checkpoint()
    trackers: tuple[str, ...] = ()
    expected: tuple[Expectation, ...] = ()

    @property
    def trainable(self) -> str | tuple[str, ...]:
        """Which parameters of the backbone train: "none", "all", "tuner", or patterns of names."""
        if self.model.tuner is not None:
            return "tuner"
        if self.model.trainable is not None:
            return self.model.trainable
        steps = takes_steps(self.method.name, self.method.options)
        return "all" if self.model.kind == "mlp" and steps else "none"

    @property
    def cached(self) -> bool:
        """Whether features are computed once and kept on disk."""
        if self.model.cache is not None:
            return self.model.cache
        frozen = self.trainable == "none" and not needs_blocks(self.method.name)
        return self.model.kind in TRANSFORMERS and frozen and not self.preprocessing.augments

    @model_validator(mode="after")
    def _possible(self) -> "Recipe":
        if self.data.online and self.training.epochs > 1:
            raise complaint(
                f"got training.epochs={self.training.epochs} with data.online=true",
                "one epoch, because an online stream shows each sample once",
                "Leave training.epochs out, or data.online.",
            )
        if not takes_steps(self.method.name, self.method.options):
            closed = f"{self.method.name} is a closed form"
            unread = [key for key in Training.model_fields if key != "batch_size"]
            self.training.refuse_set("training", unread, closed)
            self.preprocessing.refuse_set("preprocessing", AUGMENTATIONS, f"{closed} that reads images once")
            if self.trainable != "none":
                self.model.refuse_set("model", ("trainable", "tuner"), f"{closed} on a frozen backbone")
        if not takes_model(self.method.name):
            self.model.refuse_set("model", ("head", "new_rows"), f"{self.method.name} brings its own head")
        if needs_tuner(self.method.name) and self.model.tuner is None:
            raise complaint(
                f"got method.name={self.method.name!r} without model.tuner",
                "a pretrained backbone with a tuner",
                "Add model.tuner, for example {kind: lora, rank: 4}; or choose another method.",
            )
        if needs_blocks(self.method.name):
            parts = f"{self.method.name} puts parts of its own into the blocks of a frozen backbone"
            self.model.refuse_set("model", ("trainable", "tuner", "cache"), parts)
            if self.model.kind not in TRANSFORMERS:
                raise complaint(
                    f"got method.name={self.method.name!r} with model.backbone={self.model.backbone!r}",
                    "a pretrained transformer",
                    "Set model.backbone, for example hf:google/vit-base-patch16-224.",
                )
        if self.cached and self.trainable != "none":
            self.model.refuse_set("model", ("cache",), "the features change while the backbone trains")
        if self.cached and self.preprocessing.augments:
            self.model.refuse_set("model", ("cache",), "random crops and flips make other features in every epoch")
        return self

    def dump(self) -> dict[str, Any]:
        """The whole recipe, defaults included, as plain JSON values."""
        return self.model_dump(mode="json")

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides the numbers: not of name, checkpoints, trackers and expected values."""
        deciding = {key: value for key, value in self.dump().items() if key not in NOT_DECIDING}
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
        for inner in _sections_in(field.annotation):
            yield from _known_keys(inner, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """A section, or those within an optional one or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _refusal(error: ValidationError) -> ValueError:
    """The first problem in the form of the house; an unknown key before what may be missing because of it."""
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    # Within a union pydantic names the alternative too; a place in a list is no part of a known key.
    parts = [str(part) for part in problem["loc"] if not (part in ("int", "str") or "[" in str(part))]
    key = ".".join(parts)
    given = f"got {key}={problem['input']!r}"
    expected = problem["msg"].removeprefix("Input should be ")
    match problem["type"]:
        case "value_error":
            own: ValueError = problem["ctx"]["error"]
            return own
        case "extra_forbidden":
            known = list(_known_keys(Recipe))
            section = ".".join(part for part in parts[:-1] if not part.isdecimal())
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
