"""Dotted keys and strict YAML: how recipes, overrides and filters are written."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher, get_close_matches
from typing import Any

import yaml

from forgetcast.checks import complaint

_DIGITS_AND_EXPONENT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """The loader of `yaml.safe_load`, which also refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (key_node, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} twice", problem_mark=key_node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The dumper of `yaml.safe_dump`, for what `_Loader` reads."""


# YAML 1.1 takes 1e-3 for a string, because it has no dot; whoever types it as a learning rate means a number.
for _way in (_Loader, _Dumper):
    _way.add_implicit_resolver("tag:yaml.org,2002:float", _DIGITS_AND_EXPONENT, list("-+0123456789"))


def parse_yaml(text: str, origin: str) -> Any:
    """What a YAML text says.

    Args:
        text: YAML.
        origin: what messages call it.

    Raises:
        ValueError: no YAML, a key twice, a tag beyond plain data, a value that JSON cannot hold (a date, NaN).
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value, allow_nan=False)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise complaint(
            f"cannot read {origin} ({reason})",
            "YAML of plain finite values, each key once",
            "Correct it; put quotes around a string that looks like a date.",
        ) from error
    return value


def to_yaml(tree: Mapping[str, Any]) -> str:
    """YAML that `parse_yaml` reads back as the same tree."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False)


def parse_assignment(text: str) -> tuple[str, Any]:
    """Key and value of `some.key=value`; the value is read as YAML.

    Raises:
        ValueError: no `=`, no key, a value that is no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise complaint(f"got {text!r}", "key=value with a dotted key", "Write for example training.epochs=3.")
    return key, parse_yaml(value, f"the value of {key}")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a tree by their dotted keys."""

    def leaves(branch: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in branch.items():
            if isinstance(value, Mapping):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(leaves(tree, ""))


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The remedy for an unknown dotted key: the nearest known one by its last part, then by the whole."""
    last = {key: key.rpartition(".")[2] for key in known}
    near = get_close_matches(given.rpartition(".")[2], list(last.values()), n=1)
    if not near:
        return "Choose one of them." if last else "Leave it out."
    keys = [key for key in last if last[key] == near[0]]
    return f"Did you mean {max(keys, key=lambda key: SequenceMatcher(None, given, key).ratio())!r}?"
