r"""Spaces that old activations span, found from second moments alone.

    C = sum_i x_i x_i^T        over all rows of a task, uncentred, in float64; no row is stored, shards add

At the end of a task the part of C outside the basis L so far is decomposed, and the fewest directions are added with
which the basis holds a share epsilon of the task's energy (GPM, arXiv 2103.09762; G5 of docs/projection.md):

    ||L L^T X||_F^2 + ||added||_F^2 >= epsilon ||X||_F^2
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint, require_choice, require_finite, require_number
from forgetcast.protect.parameters import evaluating
from forgetcast.tuners.base import Site, Space

Energy = Literal["sigma2", "sigma4"]
ENERGIES: tuple[Energy, ...] = ("sigma2", "sigma4")
SLACK = 1e-12
"""Rounding of an energy that sums to its total."""


def moments_of(
    model: nn.Module,
    spaces: Iterable[Space],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
) -> dict[Space, Float[Tensor, "k d d"]]:
    """Second moments of the rows that each space sees while the model reads the batches, in evaluation mode.

    Args:
        model: with the tuner in place.
        spaces: of its sites.
        batches: of old inputs.
        forward: runs the model on one.

    Raises:
        ValueError: no batch, rows that are not finite, or a space that saw none.

    Cost: one forward pass a sample, and 2 d^2 flops a row and space.
    """
    found: dict[Space, Tensor] = {}

    def gather(space: Space) -> Callable[[Tensor], None]:
        def seen(rows: Tensor) -> None:
            require_finite(f"rows of {space.name}", rows)
            rows = rows.flatten(1, 2).double()
            moment = rows.mT @ rows
            found[space] = moment if space not in found else found[space] + moment

        return seen

    spaces = list(spaces)
    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for space in spaces:
            stack.enter_context(space.watch(gather(space)))
        for batch in batches:
            forward(model, batch)
    silent = [space.name for space in spaces if space not in found]
    if silent:
        raise complaint(
            f"no rows were seen at {silent[:3]} ({len(silent)} spaces)",
            "at least one batch that runs through all tuned layers",
            "Give old inputs, and a forward that runs the whole model.",
        )
    return found


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal directions of old activations, for each of k blocks.

    Attributes:
        directions: k matrices (d, rank of the block), float64.
        width: d.
    """

    directions: tuple[Float[Tensor, "d _"], ...]
    width: int

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

    def grown(self, moment: Float[Tensor, "k d d"], threshold: float, energy: Energy = "sigma2") -> "Basis":
        """With the directions that a further task needs.

        Args:
            moment: C of the task.
            threshold: epsilon, in (0, 1]; 1 takes all that can be told from rounding.
            energy: what the shares are of: "sigma2", the energy of the rows (GPM); "sigma4", that of C itself, which
                released codes take: far fewer directions at the same epsilon.

        Raises:
            ValueError: a moment of another shape or not finite.

        Cost: one eigendecomposition, about 10 d^3 flops a block.
        """
        require_number("threshold", threshold, most=1.0, strict=True)
        require_choice("energy", energy, ENERGIES)
        if moment.shape != (len(self.directions), self.width, self.width):
            raise complaint(
                f"moments of shape {tuple(moment.shape)}",
                f"({len(self.directions)}, {self.width}, {self.width})",
                "Collect them from the same sites.",
            )
        require_finite("moments", moment)
        blocks = zip(self.directions, moment.cpu(), strict=True)
        return Basis(tuple(_grown(basis, block, threshold, energy) for basis, block in blocks), self.width)


def bases(
    sites: Sequence[Site],
    moments: Mapping[Space, Tensor],
    known: Mapping[str, Basis],
    threshold: float,
    energy: Energy = "sigma2",
) -> dict[str, Basis]:
    """The basis of every space of the sites after a further task, by the names of the spaces."""
    found = {}
    for site in sites:
        for space in (site.right, site.left):
            if space is not None:
                before = known.get(space.name, Basis.empty(space.blocks, space.width))
                found[space.name] = before.grown(moments[space], threshold, energy)
    return found


def _grown(basis: Tensor, moment: Tensor, threshold: float, energy: Energy) -> Tensor:
    moment = (moment + moment.T) / 2
    inside = basis.T @ moment
    part = moment - basis @ inside - inside.T @ basis.T + basis @ (inside @ basis) @ basis.T
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh((part + part.T) / 2))
    values = values.clamp_min(0)
    power = 1 if energy == "sigma2" else 2
    own = torch.linalg.eigvalsh(inside @ basis).clamp_min(0) if basis.shape[1] else values[:0]
    held, gained = float(own.pow(power).sum()), values.pow(power).cumsum(0)
    total = held + (float(gained[-1]) if len(gained) else 0.0)
    rounding = len(moment) * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(moment, 2))
    real = int((values > rounding).sum())
    enough = int((held + gained < threshold * total * (1 - SLACK)).sum()) + 1
    wanted = 0 if held >= threshold * total * (1 - SLACK) else enough
    added = min(real if threshold == 1 else wanted, real)
    joined: Tensor = torch.linalg.qr(torch.cat([basis, vectors[:, :added]], 1)).Q
    return joined
