r"""Gradient projection for parameter-efficient tuning: steps that leave old answers alone (PEGP, arXiv 2405.13383).

What is projected is the optimiser's step, parameters after minus before (G6 of docs/projection.md):

    theta <- theta_before + P_left (theta_after - theta_before) P_right,     P = I - rho L L^T

so that the condition holds for momentum, Adam, decoupled weight decay and clipped gradients alike. Projecting the
gradient alone, as the paper does, lets them leave the space again; it is here by name, to measure how far.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakSet

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from forgetcast.checks import complaint, require_choice, require_number
from forgetcast.protect.spaces import Basis, Energy, bases, moments_of
from forgetcast.tuners.base import Site, Space

FEW = 0.1
"""Share of free directions under which a site is said to be nearly exhausted."""
GUARDED: "WeakSet[Optimizer]" = WeakSet()
"""Optimisers under `protect`: two projections one after the other keep neither's promise."""
Target = Literal["step", "gradient"]
TARGETS: tuple[Target, ...] = ("step", "gradient")


@dataclass(frozen=True, eq=False)
class Projection:
    """The spaces that old tasks occupy at the sites of a tuner.

    Attributes:
        sites: of the tuner.
        known: basis of each space, by its name; empty before the first task.
        threshold: epsilon, the share of each task's energy that is protected; 1 forbids all that can be told from
            rounding, which on real data is every direction there is.
        strength: rho: 1 forbids the old directions, less slows steps along them.
        energy: what epsilon is a share of.

    Examples:
        >>> import torch, forgetcast as fc
        >>> from forgetcast.tuners.base import linear_sites
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.Linear(8, 3, bias=False)
        >>> old = torch.randn(4, 8)
        >>> before = layer(old).detach()
        >>> projection = fc.Projection(linear_sites("layer", layer), threshold=1.0).after(layer, [old])
        >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        >>> with fc.protect(optimizer, projection):
        ...     for _ in range(10):
        ...         optimizer.zero_grad()
        ...         layer(torch.randn(4, 8)).square().mean().backward()
        ...         _ = optimizer.step()
        >>> bool(torch.allclose(layer(old), before, atol=1e-5))
        True
    """

    sites: tuple[Site, ...]
    known: Mapping[str, Basis] | None = None
    threshold: float = 0.95
    strength: float = 1.0
    energy: Energy = "sigma2"

    def __post_init__(self) -> None:
        require_number("threshold", self.threshold, most=1.0, strict=True)
        require_number("strength", self.strength, most=1.0)
        owners: dict[int, str] = {}
        for site in self.sites:
            for name, parameter in zip(site.names, site.parameters, strict=True):
                if id(parameter) in owners:
                    raise complaint(
                        f"one parameter as {owners[id(parameter)]} and as {name}",
                        "parameters that act at one site each",
                        "Untie them: what each site forbids alone does not protect both.",
                    )
                owners[id(parameter)] = name

    def after(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
    ) -> "Projection":
        """With the spaces of a task that has been learnt; warns of sites that it leaves few free directions.

        Args:
            model: with the tuner in place, after the task.
            batches: of the task's inputs.
            forward: runs the model on one.

        Raises:
            ValueError: inputs that do not reach every site, or rows that are not finite.

        Cost: one forward pass a sample; one eigendecomposition a space.
        """
        moments = moments_of(model, self._spaces(), batches, forward)
        grown = bases(self.sites, moments, self.known or {}, self.threshold, self.energy)
        few = [name for name, basis in grown.items() if basis.free < FEW * basis.width]
        if few:
            warnings.warn(
                f"{len(few)} of {len(grown)} spaces have less than {FEW:.0%} of their directions free, {few[0]} "
                f"{grown[few[0]].free} of {grown[few[0]].width}: parameters there hardly move any more. "
                "Lower the threshold or the strength, or raise the tuner's rank.",
                stacklevel=2,
            )
        return replace(self, known=grown)

    def projected(self, site: Site, update: Float[Tensor, "k a b"]) -> Float[Tensor, "k a b"]:
        """The part of an update that is allowed. Cost: 4 a b r flops with r directions."""
        for space, transposed in ((site.right, False), (site.left, True)):
            basis = None if space is None or not self.known else self.known.get(space.name)
            if basis is None:
                continue
            blocks = update.mT if transposed else update
            kept = [
                self._without(block, directions.to(block))
                for block, directions in zip(blocks, basis.directions, strict=True)
            ]
            update = torch.stack(kept).mT if transposed else torch.stack(kept)
        return update

    def table(self) -> pd.DataFrame:
        """Directions held and free: space, width, rank (of the fullest block), free."""
        rows = [(name, basis.width, max(basis.ranks), basis.free) for name, basis in (self.known or {}).items()]
        return pd.DataFrame(rows, columns=["space", "width", "rank", "free"])

    def state_dict(self) -> dict[str, Tensor]:
        """The bases, by space and block."""
        return {
            f"{name}/{k}": block.contiguous()
            for name, basis in (self.known or {}).items()
            for k, block in enumerate(basis.directions)
        }

    def with_state(self, state: Mapping[str, Tensor]) -> "Projection":
        """With bases that `state_dict` gave.

        Raises:
            ValueError: spaces or widths that the sites do not have, or bases that are none.
        """
        known = {}
        for space in self._spaces():
            names = [f"{space.name}/{k}" for k in range(space.blocks)]
            blocks = [state[name].double().cpu() for name in names if name in state]
            if len(blocks) < len(names) or not all(_orthonormal(block, space.width) for block in blocks):
                raise complaint(
                    f"bases of {space.name} of shape {[tuple(block.shape) for block in blocks]}",
                    f"{space.blocks} of {space.width} rows, with orthonormal columns",
                    "Load the state into the tuner that it was saved with.",
                )
            known[space.name] = Basis(tuple(blocks), space.width)
        strangers = set(state) - {f"{name}/{k}" for name, basis in known.items() for k in range(len(basis.directions))}
        if strangers:
            raise complaint(
                f"bases of {sorted(strangers)[:3]}, which no site has",
                f"those of {len(self._spaces())} spaces",
                "Load the state into the tuner that it was saved with.",
            )
        return replace(self, known=known)

    def _spaces(self) -> list[Space]:
        return [space for site in self.sites for space in (site.right, site.left) if space is not None]

    def _without(self, update: Float[Tensor, "a b"], directions: Float[Tensor, "b r"]) -> Float[Tensor, "a b"]:
        return update - self.strength * (update @ directions) @ directions.T


@contextmanager
def protect(optimizer: Optimizer, projection: Projection, target: Target = "step") -> Iterator[None]:
    """While this context is open, every step of the optimiser is projected; for any loop.

    Args:
        optimizer: any; with gradient scaling, steps that it skips are left alone.
        projection: the spaces of old tasks; of its parameters those that the optimiser has are projected.
        target: "step", or "gradient" as in the paper.

    Raises:
        ValueError: no parameter of the projection is the optimiser's; a site of which it has a part.

    Cost: a copy of the projected parameters and 4 a b r flops a site and step.
    """
    require_choice("target", target, TARGETS)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper the one that steps
    if optimizer in GUARDED:
        raise complaint(
            "an optimiser that is protected already", "one projection", "Stack tasks with Projection.after."
        )
    sites = _of(optimizer, projection.sites)
    before: dict[Site, Tensor] = {}

    def start(_: Optimizer, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if target == "gradient" and (named.get("closure") or any(map(callable, given[1:]))):
            raise complaint("a step with a closure", "target='step'", "A closure makes gradients anew inside the step.")
        for site in sites:
            if target == "step":
                before[site] = site.matrix([parameter.detach() for parameter in site.parameters]).clone()
            elif any(parameter.grad is not None for parameter in site.parameters):
                for parameter in site.parameters:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                allowed = projection.projected(site, site.matrix([_gradient(one) for one in site.parameters]))
                for parameter, part in zip(site.parameters, site.split(allowed), strict=True):
                    _gradient(parameter).copy_(part)

    def end(*_: Any) -> None:
        for site, matrix in before.items():
            moved = site.matrix([parameter.detach() for parameter in site.parameters]) - matrix
            allowed = matrix + projection.projected(site, moved)
            for parameter, part in zip(site.parameters, site.split(allowed), strict=True):
                parameter.data.copy_(part)
        before.clear()

    GUARDED.add(optimizer)
    handles = (optimizer.register_step_pre_hook(start), optimizer.register_step_post_hook(end))
    try:
        yield
    finally:
        GUARDED.discard(optimizer)
        for handle in handles:
            handle.remove()


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _orthonormal(block: Tensor, width: int) -> bool:
    if block.ndim != 2 or block.shape[0] != width or block.shape[1] > width:
        return False
    gram = block.T @ block
    return bool(torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-6))


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
