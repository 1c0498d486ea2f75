r"""What is allowed of an update, given the spaces that old tasks occupy (PEGP, arXiv 2405.13383).

    D <- P_left D P_right,     P = I - rho L L^T

with L the basis of old activations on each side of a site. `protect/restraint.py` applies it to an optimiser's steps.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from forgetcast.checks import complaint, require_choice, require_number
from forgetcast.protect.spaces import ENERGIES, Basis, Energy, Moment, attention_mask, bases, moments_of
from forgetcast.protect.spread import keeping_spread
from forgetcast.tuners.base import Site, Space

FEW = 0.1
"""Share of free directions under which a site is said to be nearly exhausted."""
Blend = Literal["projector", "normalised"]
BLENDS: tuple[Blend, ...] = ("projector", "normalised")


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
        blend: how `strength` < 1 mixes: "projector", rho P + (1 - rho) 1, which takes the share rho off old directions
            and leaves free ones; "normalised", rho P / |P|_F + (1 - rho) 1, as NSP^2's code has it (NeurIPS 2024,
            Algorithm 2), under which free directions shrink as well, to rho / sqrt(free) + 1 - rho.

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
    blend: Blend = "projector"

    def __post_init__(self) -> None:
        require_number("threshold", self.threshold, most=1.0, strict=True)
        require_number("strength", self.strength, most=1.0)
        require_choice("blend", self.blend, BLENDS)
        require_choice("energy", self.energy, ENERGIES)
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
        mask: Callable[[Any], Bool[Tensor, "n L"] | None] = attention_mask,
    ) -> "Projection":
        """With the spaces of a task that has been learnt; warns of sites that it leaves few free directions.

        Args:
            model: with the tuner in place, after the task.
            batches: of the task's inputs.
            forward: runs the model on one.
            mask: which tokens of one are no padding, as for `moments_of`; by default what its `attention_mask` says.

        Raises:
            ValueError: inputs that do not reach every site, or rows that are not finite.

        Cost: one forward pass a sample; one eigendecomposition a space.
        """
        return self.grown(self.moments(model, batches, forward, mask))

    def moments(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
        mask: Callable[[Any], Bool[Tensor, "n L"] | None] = attention_mask,
    ) -> dict[str, Moment]:
        """What `after` learns of a task, by the names of the spaces, where processes read a shard of it each.

        Sums of the moments of shards, `{name: one[name] + other[name] for name in one}`, are those of the task: give
        them to `grown`. Arguments, errors and cost as for `after`.
        """
        return moments_of(model, self._spaces(), batches, forward, mask)

    def grown(self, moments: Mapping[str, Moment]) -> "Projection":
        """With the spaces of a task of these moments; warns as `after` does.

        Raises:
            ValueError: moments of other spaces, of other shapes, or not finite.

        Cost: one eigendecomposition a space.
        """
        grown = bases(self.sites, moments, self.known or {}, self.threshold, self.energy)
        # of width 1 are gates, which act on a constant and are meant to stand still
        few = [name for name, basis in grown.items() if basis.free < FEW * basis.width and basis.width > 1]
        if few:
            warnings.warn(
                f"{len(few)} of {len(grown)} spaces have less than {FEW:.0%} of their directions free, {few[0]} "
                f"{grown[few[0]].free} of {grown[few[0]].width}: parameters there hardly move any more. "
                "Lower the threshold or the strength, or raise the tuner's rank.",
                stacklevel=3,
            )
        shut = [site.names[0] for site in self.sites if _is_gate(site) and bool((site.matrix() == 0).any())]
        if shut:
            warnings.warn(
                f"{len(shut)} gates are zero in some heads and stand still from now on ({shut[0]}): what is behind "
                "them will never train. Train the first task before it is protected, or take gated=False.",
                stacklevel=3,
            )
        return replace(self, known=grown)

    def projected(self, site: Site, update: Float[Tensor, "k a b"]) -> Float[Tensor, "k a b"]:
        """The part of an update that is allowed. Cost: as `Basis.removed`, for each side."""
        for basis, transposed in self._forbidden(site):
            update = self._blended(basis, update.mT).mT if transposed else self._blended(basis, update)
        return update

    def _blended(self, basis: Basis, update: Float[Tensor, "k a d"]) -> Float[Tensor, "k a d"]:
        if self.blend == "projector":
            return basis.removed(update, self.strength)
        free = update.new_tensor([basis.width - rank for rank in basis.ranks]).clamp_min(1)[:, None, None]
        return (1 - self.strength) * update + self.strength * basis.removed(update) / free.sqrt()

    def allowed(
        self, site: Site, before: Float[Tensor, "k a b"], update: Float[Tensor, "k a b"]
    ) -> Float[Tensor, "k a b"]:
        """The part of a step from `before` that is allowed; where a normalisation follows, spreads stay too."""
        part = self.projected(site, update)
        if site.centred is None:
            return part
        left, right = (
            partial(self.projected, replace(site, right=None)),
            partial(self.projected, replace(site, left=None)),
        )
        return keeping_spread(before, part, site.centred, left, right)

    def restrained(self, before: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is allowed of a step of all parameters, by name, as `fc.forecast(..., restraint=)` asks.

        Args:
            before: the parameters.
            step: of them.

        Raises:
            ValueError: no parameter of a site among them, or a part of one.
        """
        found, known = dict(step), 0
        for site in self.sites:
            there = [name for name in site.names if name in step]
            if not there:
                continue
            if len(there) < len(site.names):
                raise complaint(f"a step of {there} alone", f"of {site.names}, which act together", "Train both.")
            known += 1
            start, moved = (site.matrix([given[name] for name in site.names]) for given in (before, step))
            found.update(zip(site.names, site.split(self.allowed(site, start, moved)), strict=True))
        if not known:
            raise complaint(
                f"a step of {sorted(step)[:2]} and others, none of them at a site ({self.sites[0].names[0]}, ...)",
                "the names of the model that the sites are of",
                "Make the projection from fc.sites_of(model) with the very model that is forecast.",
            )
        return found

    def restricts(self, site: Site) -> bool:
        """Whether any direction is forbidden at a site."""
        return any(any(basis.ranks) for basis, _ in self._forbidden(site))

    def table(self) -> pd.DataFrame:
        """Directions held and free: space, width, rank (of the fullest block), free."""
        rows = [(name, basis.width, max(basis.ranks), basis.free) for name, basis in (self.known or {}).items()]
        return pd.DataFrame(rows, columns=["space", "width", "rank", "free"])

    def state_dict(self) -> dict[str, Any]:
        """Threshold, strength, energy and blend; the bases, by space and block."""
        held = {
            f"{name}/{k}": block.contiguous()
            for name, basis in (self.known or {}).items()
            for k, block in enumerate(basis.directions)
        }
        return {"settings": self._settings, "bases": held}

    def with_state(self, state: Mapping[str, Any]) -> "Projection":
        """With bases that `state_dict` gave.

        Raises:
            ValueError: another threshold, strength, energy or blend; spaces or widths that the sites lack, or bases
                that are none.
        """
        require_settings(state.get("settings", {}), self._settings)
        held, known = state.get("bases", {}), {}
        for space in self._spaces() if held else ():
            names = [f"{space.name}/{k}" for k in range(space.blocks)]
            blocks = [held[name].double().cpu() for name in names if name in held]
            if len(blocks) < len(names) or not all(_orthonormal(block, space.width) for block in blocks):
                raise complaint(
                    f"bases of {space.name} of shape {[tuple(block.shape) for block in blocks]}",
                    f"{space.blocks} of {space.width} rows, with orthonormal columns",
                    "Load the state into the tuner that it was saved with.",
                )
            known[space.name] = Basis(tuple(blocks), space.width)
        strangers = set(held) - {f"{name}/{k}" for name, basis in known.items() for k in range(len(basis.directions))}
        if strangers:
            raise complaint(
                f"bases of {sorted(strangers)[:3]}, which no site has",
                f"those of {len(self._spaces())} spaces",
                "Load the state into the tuner that it was saved with.",
            )
        return replace(self, known=known or None)

    @property
    def _settings(self) -> dict[str, Any]:
        names = ("threshold", "strength", "energy", "blend")
        return {name: getattr(self, name) for name in names}

    def _forbidden(self, site: Site) -> Iterator[tuple[Basis, bool]]:
        for space, transposed in ((site.right, False), (site.left, True)):
            if space is not None and self.known and space.name in self.known:
                yield self.known[space.name], transposed

    def _spaces(self) -> list[Space]:
        return [space for site in self.sites for space in (site.right, site.left) if space is not None]


def _is_gate(site: Site) -> bool:
    """Whether a site acts on a constant."""
    return site.right is None and site.left is not None and site.left.width == 1


def require_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise if a state was saved with other options than one's own."""
    for key, value in own.items():
        if saved.get(key) != value:
            raise complaint(
                f"a state saved with {key}={saved.get(key)!r} for a projection with {key}={value!r}",
                "equal options",
                "Load it into a projection with the options that it was saved with.",
            )


def _orthonormal(block: Tensor, width: int) -> bool:
    if block.ndim != 2 or block.shape[0] != width or block.shape[1] > width:
        return False
    gram = block.T @ block
    return bool(torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-6))
