r"""Steps of an optimiser that leave old answers alone.

    theta <- theta_before + allowed(theta_after - theta_before)

What is projected is the step, so that the condition holds for momentum, Adam, decoupled weight decay and clipped
gradients alike. Projecting the gradient alone, as arXiv 2405.13383 does, lets them leave the space again; it is here by
name, to measure how far.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from forgetcast.checks import complaint, require_choice
from forgetcast.protect.projection import Projection
from forgetcast.tuners.base import Site

GUARDED: "WeakSet[Optimizer]" = WeakSet()
"""Optimisers under `protect`: two projections one after the other keep neither's promise."""
Target = Literal["step", "gradient"]
TARGETS: tuple[Target, ...] = ("step", "gradient")


class Restraint:
    """Keeps steps out of forbidden directions: `hold` before a step, `release` after it.

    Copy, difference and projection are at least in float32, and the result is rounded once. In half precision weights
    that rounding itself leaves the space: after 200 steps of AdamW in small transformers old outputs had moved by 3e-7
    with a tuner in float32, and by 4 to 9 % with one in bfloat16 (unprojected by 80 to 180 %). Keep tuners in float32.

    Args:
        projection: the spaces of old tasks.
        sites: of the projection, those whose steps are projected; one where nothing is forbidden costs nothing.
    """

    def __init__(self, projection: Projection, sites: Iterable[Site]) -> None:
        self.projection = projection
        self.sites = [site for site in sites if projection.restricts(site)]
        self.before: list[list[Tensor]] = []

    def hold(self) -> None:
        """Copy the parameters as they are before a step."""
        self.before = [[_wide(value, copy=True) for value in _values(site)] for site in self.sites]

    def release(self) -> None:
        """Take back what the step since `hold` did in forbidden directions; nothing if nothing is held."""
        for site, before in zip(self.sites, self.before, strict=False):
            moved = site.matrix([_wide(after) - held for after, held in zip(_values(site), before, strict=True)])
            allowed = site.split(self.projection.allowed(site, site.matrix(before), moved))
            for value, held, part in zip(_values(site), before, allowed, strict=True):
                value.copy_(held.add_(part))
        self.before = []

    def restrain_gradients(self) -> None:
        """Project gradients, as the paper does; a missing one counts as zero where its site has another."""
        for site in self.sites:
            if all(parameter.grad is None for parameter in site.parameters):
                continue
            for parameter in site.parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            given = [_gradient(parameter) for parameter in site.parameters]
            allowed = self.projection.projected(site, site.matrix([_wide(one) for one in given]))
            for gradient, part in zip(given, site.split(allowed), strict=True):
                gradient.copy_(part)


@contextmanager
def protect(optimizer: Optimizer, projection: Projection, target: Target = "step") -> Iterator[None]:
    """While this context is open, every step of the optimiser is projected; for any loop.

    Args:
        optimizer: any; with gradient scaling, steps that it skips are left alone.
        projection: the spaces of old tasks; of its parameters those that the optimiser has are projected.
        target: "step", or "gradient" as in the paper.

    Raises:
        ValueError: no parameter of the projection is the optimiser's; a site of which it has a part.

    Cost: a copy of the projected parameters and 4 a b min(r, b - r) flops a site and step.
    """
    require_choice("target", target, TARGETS)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper the one that steps
    if optimizer in GUARDED:
        raise complaint(
            "an optimiser that is protected already", "one projection", "Stack tasks with Projection.after."
        )
    restraint = Restraint(projection, _of(optimizer, projection.sites))

    def start(_: Optimizer, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if target == "step":
            restraint.hold()
            return
        if named.get("closure") or any(map(callable, given[1:])):
            raise complaint("a step with a closure", "target='step'", "A closure makes gradients anew inside the step.")
        restraint.restrain_gradients()

    def end(*_: Any) -> None:
        restraint.release()

    GUARDED.add(optimizer)
    handles = (optimizer.register_step_pre_hook(start), optimizer.register_step_post_hook(end))
    try:
        yield
    finally:
        GUARDED.discard(optimizer)
        for handle in handles:
            handle.remove()


def _wide(tensor: Tensor, copy: bool = False) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=copy)


def _values(site: Site) -> list[Tensor]:
    return [parameter.data for parameter in site.parameters]


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _of(optimizer: Optimizer, sites: Sequence[Site]) -> list[Site]:
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = [site for site in sites if any(id(parameter) in own for parameter in site.parameters)]
    parts = [site.names for site in found if not all(id(parameter) in own for parameter in site.parameters)]
    if not found or parts:
        has = f"only a part of {parts[0]}" if parts else "none"
        raise complaint(
            f"an optimiser that has {has} of the projected parameters",
            "the parameters of the tuner, weights with their biases",
            "Build it from tuned.parameters().",
        )
    return found
