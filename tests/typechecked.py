"""The type checker that tests put under the annotations of modules and classes: an int is accepted for a float.

A function within a function is defined anew at each call; to prepare its checks then would cost more than the tests do.
"""

from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped


def install() -> None:
    """Check shapes and types of all that is imported from forgetcast from here on."""
    jaxtyping.jaxtyped = _outermost
    jaxtyping.install_import_hook("forgetcast", "typechecked.check")


def _outermost(*, typechecker: Any) -> Callable[[Any], Any]:
    checked = _jaxtyped(typechecker=typechecker)
    return lambda defined: defined if "<locals>" in defined.__qualname__ else checked(defined)
