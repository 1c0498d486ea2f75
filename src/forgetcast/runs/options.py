"""The options of methods and tuners: read off their constructors, so that a new one needs no schema of its own."""

import inspect
import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from forgetcast.checks import complaint
from forgetcast.methods.base import Method
from forgetcast.methods.registry import method_class
from forgetcast.runs.keys import did_you_mean

GIVEN_BY_THE_RUN = ("model", "backbone", "width", "protections", "seed")


def method_options(method: type[Method]) -> dict[str, inspect.Parameter]:
    """The parameters of a method's constructor that a recipe may give: all but those that the run gives."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(method).parameters
    return {key: value for key, value in parameters.items() if key not in GIVEN_BY_THE_RUN and value.kind in named}


def takes_model(name: str) -> bool:
    """Whether a method takes a whole model; any other takes a backbone and brings its own head."""
    return "model" in inspect.signature(method_class(name)).parameters


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Hold options against the constructor of a method.

    Raises:
        ValueError: an unknown method or option, a missing option, a value of another type.
    """
    for key in GIVEN_BY_THE_RUN:
        if key in options:
            raise complaint(
                f"got method.{key}={options[key]!r}", f"no {key}, which the run gives", f"Leave method.{key} out."
            )
    check_arguments("method", name, method_options(method_class(name)), options)


def check_arguments(
    section: str, name: str, known: Mapping[str, inspect.Parameter], options: Mapping[str, Any]
) -> None:
    """Hold the keys of a section against parameters of a constructor.

    Args:
        section: of the recipe, whose keys the options are.
        name: of what the constructor makes.
        known: its parameters.
        options: as the recipe gives them.

    Raises:
        ValueError: an unknown option, a missing one, a value of another type.
    """
    for key, value in options.items():
        if key not in known:
            raise complaint(
                f"{name} has no option {section}.{key}",
                f"one of {sorted(known)}" if known else "no option",
                did_you_mean(f"{section}.{key}", [f"{section}.{option}" for option in known]),
            )
        _check_type(f"{section}.{key}", value, known[key].annotation)
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            raise complaint(f"no {section}.{key}", f"a value, which {name} has no default for", f"Add {section}.{key}.")


def _check_type(key: str, value: Any, annotation: Any) -> None:
    try:
        # By way of JSON a strict check takes a list for a tuple, which is what YAML can say.
        TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except (ValidationError, PydanticSchemaGenerationError) as error:
        kind = getattr(annotation, "__name__", str(annotation))
        raise complaint(f"got {key}={value!r}", f"a value of type {kind}", f"Correct {key}.") from error
