"""Checks of what a user gives. Every message says what was given, what was expected, and the remedy.

Nothing here imports PyTorch, so that a command which only reads files answers at once.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from math import isfinite
from numbers import Integral, Real
from typing import Any


def complaint(given: str, expected: str, remedy: str) -> ValueError:
    """The one form of error message: `given; expected ...; remedy`."""
    return ValueError(f"{given}; expected {expected}. {remedy}")


def require_module(name: str, extra: str) -> Any:
    """Import a module of a package that comes with an extra; raise with how to install it where it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise complaint(
            f"cannot import {package} ({error})", package, f"Install it: pip install 'forgetcast[{extra}]'."
        ) from error


def require_number(
    name: str, value: Any, *, least: float = 0.0, most: float = float("inf"), strict: bool = False
) -> None:
    """Raise unless `value` is a finite number in `[least, most]` (in `(least, most]` if `strict`)."""
    number = isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
    if not number or value < least or value > most or (strict and value == least):
        interval = f"a finite number {'above' if strict else 'of at least'} {least:g}"
        if most != float("inf"):
            interval += f" and at most {most:g}"
        raise complaint(f"got {name}={value!r}", interval, f"Correct {name}.")


def require_integer(name: str, value: Any, *, least: int = 0) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise complaint(f"got {name}={value!r}", f"an integer of at least {least}", f"Correct {name}.")


def require_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise unless `value` is one of `choices`; names the nearest."""
    known = list(choices)
    if value not in known:
        near = get_close_matches(str(value), known, n=1)
        remedy = f"Did you mean {near[0]!r}?" if near else f"Choose one of {known}."
        raise complaint(f"got {name}={value!r}", f"one of {known}", remedy)


def require_finite(name: str, values: Any, *, first_row: int = 0) -> None:
    """Raise if the tensor `values` holds a NaN or an infinity, naming the first place of one.

    Cost: one sum over `values`; the search for the place runs only when that sum is not finite.
    """
    if values.sum().isfinite():
        return
    bad = (~values.isfinite()).nonzero()
    if len(bad) == 0:
        return
    place = bad[0].tolist()
    value = values[tuple(place)].item()
    place[0] += first_row
    raise complaint(
        f"{name} of shape {tuple(values.shape)} holds {value} at {place} ({len(bad)} such values)",
        "finite numbers only",
        "Remove or repair these samples, or look for an overflow in the backbone (half precision often causes one).",
    )
