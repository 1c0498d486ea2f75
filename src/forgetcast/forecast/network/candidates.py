"""Which parameters could be the ones to train: nested sets, from the head alone to all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from forgetcast.checks import complaint
from forgetcast.forecast.network.given import Outputs, reader
from forgetcast.forecast.network.head import Named, Network, Restraint, network
from forgetcast.forecast.network.modules import modules_of
from forgetcast.forecast.network.samples import samples_of
from forgetcast.tangent.jacobian import Choice, trainable


@dataclass(frozen=True)
class Candidate:
    """A set of parameters that could be the ones to train.

    Attributes:
        name: what tables call it.
        parameters: names in the model.

    Raises:
        ValueError: no name, no parameter.
    """

    name: str
    parameters: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.name or not self.parameters:
            raise complaint(
                f"a candidate {self.name!r} of {len(self.parameters)} parameters",
                "a name, and at least one parameter",
                "Leave it out: the model as it is needs no forecast.",
            )


def candidates(
    model: nn.Module,
    samples: Any,
    *,
    parameters: Choice = None,
    outputs: Outputs = None,
    modules: Sequence[str] | None = None,
    counts: Sequence[int] | None = None,
) -> tuple[Candidate, ...]:
    """Nested sets from the end of the model: the head alone, with the last 1, 2, 4, ... modules, and all.

    The head always trains. Modules are in the order of `model.named_parameters()`, in whatever order they are called.

    Args:
        model: any module.
        samples: some of its inputs, with or without targets: which layer is the head is seen when the model is called.
        parameters: that may train: names, a filter, or None for all that require gradients.
        outputs: as for `forecast`.
        modules: patterns of names, one a module; by default the blocks of the stack (`modules_of`).
        counts: how many modules train beside the head, for each candidate; by default 0, 1, 2, 4, ... and all.

    Returns:
        "head" (unless the model has no linear head that may train), "last 1", "last 2", "last 4", ..., "all"; the
        larger ones contain the smaller.

    Raises:
        ValueError: nothing to train, unknown names, patterns that do not fit, counts of more modules than there are,
            samples that the model does not take.

    Cost: one forward pass of two samples.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        >>> [(each.name, len(each.parameters)) for each in candidates(model, torch.randn(2, 4))]
        [('head', 2), ('last 1', 4), ('last 2', 6), ('all', 8)]
    """
    given = samples_of("samples", samples)
    few = given.at(torch.arange(min(2, len(given)))).to(next(model.parameters()).device)
    return nested(network(model, few, trainable(model, parameters), reader(outputs)), modules, counts)


def nested(
    net: Network, modules: Sequence[str] | None = None, counts: Sequence[int] | None = None
) -> tuple[Candidate, ...]:
    """As `candidates`, of all that trains in a network."""
    own = {id(parameter) for parameter in net.of_head.values()}
    head = tuple(name for name, parameter in net.model.named_parameters() if id(parameter) in own)
    stack = list(modules_of(net.body, modules).values()) if net.body else []
    least = 0 if head else 1
    if counts is None:
        counts = sorted({least, *_doublings(len(stack))})
    found = []
    for count in counts:
        if not least <= count <= len(stack):
            raise complaint(
                f"got a count of {count} modules", f"counts from {least} to {len(stack)}", "Leave None for doublings."
            )
        last = tuple(name for names in stack[len(stack) - count :] for name in names)
        name = "head" if count == 0 else "all" if count == len(stack) else f"last {count}"
        found.append(Candidate(name, (*last, *head)))
    return tuple(found)


def narrowed(net: Network, candidate: Candidate) -> Network:
    """The network where only the candidate's parameters train.

    Raises:
        ValueError: a name that the model does not have, or a parameter that is not among those that may train.
    """
    chosen = trainable(net.model, candidate.parameters)
    own = {id(parameter) for parameter in chosen.values()}
    may = {id(parameter) for parameter in (*net.body.values(), *net.of_head.values())}
    strangers = [name for name, parameter in chosen.items() if id(parameter) not in may]
    if strangers:
        raise complaint(
            f"the candidate {candidate.name!r} with {strangers}",
            "parameters among those that may train",
            "Leave `parameters` out, or name them there.",
        )
    body, of_head = (
        {name: parameter for name, parameter in part.items() if id(parameter) in own}
        for part in (net.body, net.of_head)
    )
    still = {
        name: parameter
        for name, parameter in net.model.named_parameters()
        if id(parameter) in may and id(parameter) not in own
    }
    restraint = None if net.restraint is None else _with(net.restraint, still)
    return replace(net, body=body, of_head=of_head, restraint=restraint)


def _with(restraint: Restraint, still: Mapping[str, nn.Parameter]) -> Restraint:
    """The restraint of a training in which some parameters stand still: they take a step of zero."""

    def restrained(before: Named, step: Named) -> Named:
        stay = {name: parameter.detach() for name, parameter in still.items()}
        zeros = {name: torch.zeros_like(value) for name, value in stay.items()}
        taken = restraint({**before, **stay}, {**step, **zeros})
        return {name: taken[name] for name in step}

    return restrained


def _doublings(count: int) -> Iterator[int]:
    """1, 2, 4, ... below `count`, and `count`."""
    step = 1
    while step < count:
        yield step
        step *= 2
    if count:
        yield count
