r"""Vulnerable modes: along which old eigen-directions the forecast drift lies, and how few carry it.

With S_old = V diag(s) V^T and the weight change Delta W, mode j of the old Gram carries the drift energy

    E_j = || u_j^T Delta F ||^2 = s_j || v_j^T Delta W ||^2 ,      sum_j E_j = || Delta F ||_F^2

Each sample mode stands for C modes of the tangent kernel (the Kronecker factor). Source: arXiv 2606.18024, Eq. 5, 6.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_choice, require_integer, require_number
from forgetcast.tangent.spectrum import Spectrum, participation_ratio

Order = Literal["eigenvalue", "energy"]


@dataclass(frozen=True, eq=False)
class Modes:
    """The leading eigenmodes of the old Gram and the forecast drift along them.

    Attributes:
        eigenvalues: (k,) of the old Gram, falling.
        energy: (k,) drift energy E_j, summed over outputs.
        share: (k,) E_j / total.
        cumulative: (k,) running sum of `share`.
        feature_directions: (rows, k) v_j; the last row belongs to the bias if there is one.
        output_patterns: (k, C) u_j^T Delta F: how far each output moves along mode j.
        total_energy: `||Delta F||_F^2` over all modes.
        effective_rank: participation ratio of all eigenvalues, known before the new task is.
        energy_effective_rank: participation ratio of all drift energies.
    """

    eigenvalues: Float[Tensor, " k"]
    energy: Float[Tensor, " k"]
    share: Float[Tensor, " k"]
    cumulative: Float[Tensor, " k"]
    feature_directions: Float[Tensor, "rows k"]
    output_patterns: Float[Tensor, "k C"]
    total_energy: float
    effective_rank: float
    energy_effective_rank: float


@dataclass(frozen=True)
class VulnerableRank:
    """How few modes carry a share of the forecast drift. The number means nothing without threshold and order.

    Attributes:
        sample_modes: k_G, modes of the old Gram, taken in `order`.
        outputs: C, the Kronecker factor.
        function_modes: C k_G, an upper bound for the modes of the tangent kernel.
        minimum_function_modes: fewest (mode, output) pairs with that share of the energy, largest first.
        energy: the threshold.
        order: "eigenvalue" (fixed before the new task is known) or "energy" (largest drift first).
        captured: share of the energy in those k_G modes.
    """

    sample_modes: int
    outputs: int
    function_modes: int
    minimum_function_modes: int
    energy: float
    order: Order
    captured: float


@dataclass(frozen=True)
class Certificate:
    """What cannot be lost outside the first k modes: `tail <= projected_bound <= total_bound`.

    Attributes:
        modes: k.
        tail: drift energy of the modes after the k-th.
        projected_bound: `s_{k+1} ||P_{>k} Delta W||^2`, P the projector on the remaining directions.
        total_bound: `s_{k+1} ||Delta W||^2`: needs only the size of the step.
        rank_bound: rank of the drift matrix is at most this: `min(C, rows)`, and the rank of the new features where
            the training cannot leave their span (no decay toward zero, no penalty, no Adam).
    """

    modes: int
    tail: float
    projected_bound: float
    total_bound: float
    rank_bound: int


def mode_table(old: Spectrum, change: Float[Tensor, "rows C"], k: int) -> Modes:
    """The first `k` modes (fewer if the old Gram has fewer). Cost: 2 rows^2 C.

    Raises:
        ValueError: k below 1.
    """
    require_integer("k", k, least=1)
    patterns = _patterns(old, change)
    energy = patterns.square().sum(1)
    total = float(energy.sum())
    share = energy / total if total > 0 else torch.zeros_like(energy)
    return Modes(
        old.values[:k],
        energy[:k],
        share[:k],
        share.cumsum(0)[:k],
        old.vectors[:, :k],
        patterns[:k],
        total,
        old.effective_rank,
        participation_ratio(energy),
    )


def vulnerable_rank(
    old: Spectrum, change: Float[Tensor, "rows C"], energy: float = 0.9, order: Order = "eigenvalue"
) -> VulnerableRank:
    """Fewest modes, taken in `order`, with at least the share `energy` of the drift; 0 where nothing drifts.

    Raises:
        ValueError: a threshold outside (0, 1], an unknown order.
    """
    require_number("energy", energy, most=1.0, strict=True)
    require_choice("order", order, ("eigenvalue", "energy"))
    entries = _patterns(old, change).square()
    per_mode = entries.sum(1)
    if order == "energy":
        per_mode = per_mode.sort(descending=True).values
    outputs = change.shape[1]
    count, captured = _fewest(per_mode, energy)
    least, _ = _fewest(entries.flatten().sort(descending=True).values, energy)
    return VulnerableRank(count, outputs, outputs * count, least, energy, order, captured)


def certificate(old: Spectrum, change: Float[Tensor, "rows C"], k: int, new_rank: int) -> Certificate:
    """The tail certificate after the first `k` modes. Cost: 2 rows^2 C.

    Raises:
        ValueError: k below 0 or above the number of modes.
    """
    require_integer("k", k)
    if k > len(old.values):
        raise complaint(f"got k={k}", f"at most {len(old.values)} modes", "Lower k.")
    tail = float(_patterns(old, change)[k:].square().sum())
    following = float(old.values[k]) if k < len(old.values) else 0.0
    step = float(change.square().sum())
    outside = step - float((old.vectors[:, :k].T @ change.to(old.vectors)).square().sum())
    rank = min(change.shape[1], change.shape[0], new_rank)
    return Certificate(k, tail, following * max(outside, 0.0), following * step, rank)


def _patterns(old: Spectrum, change: Tensor) -> Float[Tensor, "k C"]:
    return old.values.sqrt()[:, None] * (old.vectors.T @ change.to(old.vectors))


def _fewest(falling: Tensor, share: float) -> tuple[int, float]:
    total = float(falling.sum())
    if total == 0:
        return 0, 1.0
    cumulative = falling.cumsum(0) / total
    reached = cumulative >= share - 1e-12
    count = int(reached.double().argmax()) + 1 if bool(reached.any()) else len(falling)
    return count, float(cumulative[count - 1])
