r"""Vulnerable modes of a network: the leading eigenvectors of the old tangent kernel, and how much drift each carries.

    K_oo = J_o J_o^T = U diag(l) U^T,      E_j = <u_j, drift>^2,      sum_j E_j = ||drift||_F^2

For a linear head these are the modes of `forgetcast.forecast.modes`, each C times. Source: arXiv 2606.18024, Eq. 5.
"""

from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import require_integer, require_number
from forgetcast.forecast.modes import Certificate
from forgetcast.tangent.leading import LeadingModes, leading_modes
from forgetcast.tangent.products import Tangent


@dataclass(frozen=True, eq=False)
class NetworkModes:
    """The k leading modes of the old tangent kernel, and what a displacement of the parameters does along them.

    Attributes:
        eigenvalues: (k,) l_j, falling.
        patterns: (k, n, C) u_j: how strongly each old output sits in mode j.
        amplitudes: (k,) `<u_j, drift>` of the linearised drift.
        total_energy: `||drift||_F^2` over all modes.
        certificate: what cannot be lost outside these modes, as far as the tangent holds.
        found: the eigensolver's result, of k + 1 modes: products, residuals, whether it converged.
    """

    eigenvalues: Float[Tensor, " k"]
    patterns: Float[Tensor, "k n C"]
    amplitudes: Float[Tensor, " k"]
    total_energy: float
    certificate: Certificate
    found: LeadingModes

    @property
    def energy(self) -> Float[Tensor, " k"]:
        """E_j."""
        return self.amplitudes.square()

    @property
    def share(self) -> Float[Tensor, " k"]:
        """E_j / total; 0 where nothing drifts."""
        return self.energy / self.total_energy if self.total_energy > 0 else torch.zeros_like(self.energy)

    def energy_of(self, drift: Float[Tensor, "n C"]) -> Float[Tensor, " k"]:
        """E_j of any drift of the same old outputs, such as a measured one."""
        return (self.patterns * drift.to(self.patterns)).sum((1, 2)).square()

    def vulnerable_rank(self, energy: float = 0.9) -> int | None:
        """Fewest modes, by eigenvalue, with the share `energy` of the drift; None where these k do not suffice."""
        require_number("energy", energy, most=1.0, strict=True)
        if self.total_energy == 0:
            return 0
        reached = self.share.cumsum(0) >= energy - 1e-12
        return int(reached.double().argmax()) + 1 if bool(reached.any()) else None


def network_modes(
    old: Tangent, delta: Float[Tensor, " P"], k: int = 10, *, tolerance: float = 1e-5, most: int = 2000, seed: int = 0
) -> NetworkModes:
    r"""The first k modes of the old tangent kernel and the drift `J_o delta` along them.

    The certificate after k modes is `tail <= l_{k+1} ||P delta||^2 <= l_{k+1} ||delta||^2`, P the projector on what is
    left of the parameter space; infinite where the eigensolver has not converged.

    Args:
        old: J of the old samples; as a matrix, where it fits, while there are fewer than some 6 k outputs.
        delta: displacement of the parameters, of a forecast or of a real training.
        k: how many modes; fewer where the old samples have fewer.
        tolerance: of the eigensolver.
        most: its products at most.
        seed: of its random start.

    Cost: some 4 to 8 products with the kernel for each mode, and one `J v`.
    """
    require_integer("k", k, least=1)
    drift = old.forward(delta.double())
    rows = drift.numel()
    k = min(k, rows)
    found = leading_modes(
        old.kernel,
        tuple(drift.shape),
        min(k + 1, rows),
        tolerance=tolerance,
        most=most,
        seed=seed,
        device=drift.device,
    )
    eigenvalues, patterns = found.values[:k], found.vectors[:k]
    amplitudes = (patterns * drift).sum((1, 2))
    total = float(drift.square().sum())
    step = float(delta.double().square().sum())
    clear = eigenvalues > 1e-6 * eigenvalues[0]  # where rounding could reach, the bound does without
    inside = float((amplitudes[clear].square() / eigenvalues[clear]).sum())
    tail = max(total - float(amplitudes.square().sum()), 0.0)
    if k == rows:
        bounds = 0.0, 0.0
    elif not found.converged:
        bounds = inf, inf
    else:
        bounds = float(found.values[k]) * max(step - inside, 0.0), float(found.values[k]) * step
    return NetworkModes(
        eigenvalues, patterns, amplitudes, total, Certificate(k, tail, *bounds, min(drift.shape)), found
    )
