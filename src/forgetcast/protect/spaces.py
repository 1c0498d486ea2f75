r"""Spaces that old activations span, found from second moments alone.

    C = sum_i x_i x_i^T        over all rows of a task, uncentred, in float64; no row is stored, shards add

At the end of a task the part of C outside the basis L so far is decomposed, and the fewest directions are added with
which the basis holds a share epsilon of the task's energy (the rule of GPM, arXiv 2103.09762):

    ||L L^T X||_F^2 + ||added||_F^2 >= epsilon ||X||_F^2
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from forgetcast.checks import complaint, require_choice, require_finite, require_number
from forgetcast.modes import evaluating
from forgetcast.tuners.base import Site, Space

Energy = Literal["sigma2", "sigma4"]
ENERGIES: tuple[Energy, ...] = ("sigma2", "sigma4")
SLACK = 1e-12
"""Rounding of an energy that sums to its total."""
NOISE = 1.0
"""Singular values of rows below so many roundings of the rows' Frobenius norm are noise. Measured: 0.03 to 0.08 inside
transformers, up to 0.6 behind two products of random matrices."""


@dataclass(frozen=True, eq=False)
class Moment:
    """Second moments of a task's rows in one space.

    Attributes:
        total: C, float64.
        rounding: machine epsilon of the coarsest type that rows came in.
    """

    total: Float[Tensor, "k d d"]
    rounding: float = torch.finfo(torch.float64).eps

    def __add__(self, other: "Moment") -> "Moment":
        return Moment(self.total + other.total, max(self.rounding, other.rounding))


def attention_mask(batch: Any) -> Bool[Tensor, "n L"] | None:
    """Which tokens of a batch are no padding: its `attention_mask`, where it is a mapping with one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def moments_of(
    model: nn.Module,
    spaces: Iterable[Space],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
    mask: Callable[[Any], Bool[Tensor, "n L"] | None] = attention_mask,
) -> dict[str, Moment]:
    """Second moments of the rows that each space sees while the model reads the batches, in evaluation mode; by name.

    Args:
        model: with the tuner in place.
        spaces: of its sites.
        batches: of old inputs.
        forward: runs the model on one.
        mask: says of a batch which of its L tokens are no padding, None if all. Rows of L tokens, or of r L (r heads
            one after the other), are left out where it is False; so the model must hide these tokens from the others.

    Raises:
        ValueError: no batch, rows that are not finite, or a space that saw none.

    Cost: one forward pass a sample, and 2 d^2 flops a row and space.
    """
    found: dict[str, Moment] = {}
    real: Tensor | None = None

    def gather(space: Space) -> Callable[[Tensor], None]:
        def seen(rows: Tensor) -> None:
            kept = _without_padding(rows, real)
            require_finite(f"rows of {space.name}", kept)
            wide = kept.double()
            moment = Moment(wide.mT @ wide, torch.finfo(rows.dtype).eps)
            found[space.name] = found[space.name] + moment if space.name in found else moment

        return seen

    spaces = list(spaces)
    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for space in spaces:
            stack.enter_context(space.watch(gather(space)))
        for batch in batches:
            real = mask(batch)
            forward(model, batch)
    silent = [space.name for space in spaces if space.name not in found]
    if silent:
        raise complaint(
            f"no rows were seen at {silent[:3]} ({len(silent)} spaces)",
            "at least one batch that runs through all tuned layers",
            "Give old inputs, and a forward that runs the whole model.",
        )
    return {
        space.name: found[space.name]
        if space.fold is None
        else Moment(space.fold(found[space.name].total), found[space.name].rounding)
        for space in spaces
    }


def _without_padding(
    rows: Float[Tensor, "k n t d"], real: Bool[Tensor, "samples L"] | None
) -> Float[Tensor, "k rows d"]:
    n, t = rows.shape[1:3]
    if real is None or len(real) != n or t % real.shape[1]:
        return rows.flatten(1, 2)
    return rows[:, real.repeat(1, t // real.shape[1]).to(rows.device)]


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal directions of old activations, for each of k blocks.

    Attributes:
        directions: k matrices (d, rank of the block), float64.
        width: d.
    """

    directions: tuple[Float[Tensor, "d _"], ...]
    width: int
    _factors: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def empty(blocks: int, width: int) -> "Basis":
        """Of no directions."""
        return Basis(tuple(torch.zeros(width, 0, dtype=torch.float64) for _ in range(blocks)), width)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Directions held, block by block."""
        return tuple(block.shape[1] for block in self.directions)

    @property
    def free(self) -> int:
        """Directions left in the fullest block."""
        return self.width - max(self.ranks)

    def removed(self, update: Float[Tensor, "k a d"], strength: float = 1.0) -> Float[Tensor, "k a d"]:
        """An update without the share `strength` of what it has along the directions: U - rho U L L^T.

        From the smaller of L and its complement C: the same is (1 - rho) U + rho U C C^T. Factors are kept, once a
        device and type.

        Cost: 4 a d min(r, d - r) flops a block.
        """
        if not any(self.ranks):
            return update
        factor, inside = self._factor(update)
        along = strength * (update @ factor) @ factor.mT
        return update - along if inside else (1 - strength) * update + along

    def _factor(self, like: Tensor) -> tuple[Float[Tensor, "k d r"], bool]:
        inside = 2 * sum(self.ranks) <= self.width * len(self.ranks)
        key = (like.device, like.dtype)
        if key not in self._factors:
            self._factors[key] = _stacked(self.directions if inside else map(_complement, self.directions)).to(like)
        return self._factors[key], inside

    def grown(self, moment: Moment, threshold: float, energy: Energy = "sigma2") -> "Basis":
        """With the directions that a further task needs.

        Args:
            moment: C of the task.
            threshold: epsilon, in (0, 1]; 1 takes all that can be told from the rounding of the rows.
            energy: what the shares are of: "sigma2", the energy of the rows (GPM); "sigma4", that of C itself, which
                released codes take: far fewer directions at the same epsilon.

        Raises:
            ValueError: a moment of another shape or not finite.

        Cost: one eigendecomposition, about 10 d^3 flops a block; old directions stay bit for bit.
        """
        require_number("threshold", threshold, most=1.0, strict=True)
        require_choice("energy", energy, ENERGIES)
        if moment.total.shape != (len(self.directions), self.width, self.width):
            raise complaint(
                f"moments of shape {tuple(moment.total.shape)}",
                f"({len(self.directions)}, {self.width}, {self.width})",
                "Collect them from the same sites.",
            )
        require_finite("moments", moment.total)
        blocks = zip(self.directions, moment.total.cpu(), strict=True)
        return Basis(
            tuple(_grown(basis, block, threshold, energy, moment.rounding) for basis, block in blocks), self.width
        )


def bases(
    sites: Sequence[Site],
    moments: Mapping[str, Moment],
    known: Mapping[str, Basis],
    threshold: float,
    energy: Energy = "sigma2",
) -> dict[str, Basis]:
    """The basis of every space of the sites after a further task, by the names of the spaces.

    Raises:
        ValueError: moments of other spaces.
    """
    names = {space.name for site in sites for space in (site.right, site.left) if space is not None}
    if names != set(moments):
        raise complaint(
            f"moments of {len(moments)} spaces, which differ in {sorted(names ^ set(moments))[:3]}",
            f"of the {len(names)} of the sites",
            "Collect them with Projection.moments.",
        )
    found = {}
    for site in sites:
        for space in (site.right, site.left):
            if space is not None:
                before = known.get(space.name, Basis.empty(space.blocks, space.width))
                found[space.name] = before.grown(moments[space.name], threshold, energy)
    return found


def _grown(
    basis: Float[Tensor, "d r"], moment: Float[Tensor, "d d"], threshold: float, energy: Energy, rounding: float
) -> Float[Tensor, "d _"]:
    moment = (moment + moment.T) / 2
    inside = basis.T @ moment
    own = inside @ basis
    half = inside.T - basis @ (own / 2)
    part = torch.addmm(moment, half, basis.T, alpha=-1).addmm_(basis, half.T, alpha=-1)
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(part))
    values = values.clamp_min(0)
    held = float(own.trace() if energy == "sigma2" else own.square().sum())
    gained = (values if energy == "sigma2" else values.square()).cumsum(0)
    goal = threshold * (held + float(gained[-1])) * (1 - SLACK)
    real = min(int((values > _noise(moment, rounding)).sum()), len(moment) - basis.shape[1])
    wanted = 0 if held >= goal else int((held + gained < goal).sum()) + 1
    return _joined(basis, vectors[:, : real if threshold == 1 else min(wanted, real)])


def _noise(moment: Float[Tensor, "d d"], rounding: float) -> float:
    """Eigenvalues up to this are rounding of the rows, or of the float64 arithmetic behind them."""
    own = len(moment) * torch.finfo(torch.float64).eps * float(moment.norm())
    return own + (NOISE * rounding) ** 2 * float(moment.trace())


def _joined(basis: Float[Tensor, "d r"], added: Float[Tensor, "d m"]) -> Float[Tensor, "d _"]:
    if not added.shape[1]:
        return basis
    for _ in range(2):  # a weak direction is orthogonal to the basis to far less than rounding; twice is enough
        added = torch.linalg.qr(added - basis @ (basis.T @ added)).Q
    return torch.cat([basis, added], 1)


def _complement(basis: Float[Tensor, "d r"]) -> Float[Tensor, "d _"]:
    whole: Tensor = torch.linalg.qr(basis, mode="complete").Q
    return whole[:, basis.shape[1] :]


def _stacked(blocks: Iterable[Tensor]) -> Float[Tensor, "k d r"]:
    """Matrices of equal height, the narrower ones with zeros behind."""
    blocks = list(blocks)
    widest = max(block.shape[1] for block in blocks)
    return torch.stack([nn.functional.pad(block, (0, widest - block.shape[1])) for block in blocks])
