"""The modules of a model that train or stand still together: the blocks of its stack."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile

from forgetcast.checks import complaint

Modules = dict[str, tuple[str, ...]]


def modules_of(names: Iterable[str], patterns: Sequence[str] | None = None) -> Modules:
    """Parameters by the module that they belong to, in the order in which these appear.

    By default a module is what lies below the first number in a name that tells parameters apart: a block of a
    transformer, a stage of a ResNet. Parameters outside of any are one module for each first part of their names, such
    as all embeddings.

    Args:
        names: of parameters, in the order of the model.
        patterns: instead, one pattern of names a module, in their order; * is any part of a name.

    Returns:
        Names of parameters by the name of their module; with patterns, by pattern.

    Raises:
        ValueError: no names; a pattern that none fits; a name that fits none, or two.

    Examples:
        >>> list(modules_of(["net.embed.word", "net.layer.0.a", "net.layer.0.mlp.1.b", "net.layer.1.a"]))
        ['net.embed', 'net.layer.0', 'net.layer.1']
    """
    known = tuple(names)
    if not known:
        raise complaint(
            "no parameter that trains", "at least one in the backbone", "Unfreeze something, or add a tuner."
        )
    return _by_stack(known) if patterns is None else _by_pattern(known, patterns)


def _by_stack(names: tuple[str, ...]) -> Modules:
    owners = [name.split(".")[:-1] for name in names]
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False))))
    if not any(part.isdigit() for owner in owners for part in owner[shared:]) and any(
        map(str.isdigit, owners[0][:shared])
    ):
        return {".".join(owners[0][:shared]): names}  # all of them in one block
    found: dict[str, list[str]] = {}
    for name, owner in zip(names, owners, strict=True):
        number = next((place for place in range(shared, len(owner)) if owner[place].isdigit()), shared)
        found.setdefault(".".join(owner[: number + 1]) or name, []).append(name)
    return {module: tuple(own) for module, own in found.items()}


def _by_pattern(names: tuple[str, ...], patterns: Sequence[str]) -> Modules:
    found = {pattern: tuple(name for name in names if fnmatchcase(name, pattern)) for pattern in patterns}
    for pattern, own in found.items():
        if not own:
            raise complaint(
                f"the pattern {pattern!r}", f"one that fits a trained name, such as {names[0]}", "Correct it."
            )
    for name in names:
        fitting = [pattern for pattern, own in found.items() if name in own]
        if len(fitting) != 1:
            raise complaint(f"{name} in the modules {fitting}", "exactly one", "Write patterns that do not overlap.")
    return found
