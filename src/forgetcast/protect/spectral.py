r"""The spectral regulariser of a linear head: hold the old outputs still along their vulnerable modes, and only there.

    L = L_new + sum_tau (mu / k) sum_{j<=k} ( u_j^T [f_tau(W) - f_tau^ref] )^2          (arXiv 2606.18024)

In Kronecker form one sample mode counts for all C outputs, `k = C k_G`, and for a linear head

    U^T phi = Sigma V^T =: S (k_G x rows)    =>    (mu / k) || S (W - W_tau) ||_F^2            (no stored sample; exact)

Limits: no mode is no penalty; all modes with 2 mu / k = 1 is joint ridge toward the reference outputs. Too few modes
is the failure to watch for: `LinearForecast.vulnerable_rank` says how many are needed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.forecast.penalty import QuadraticPenalty
from forgetcast.tangent.features import Features
from forgetcast.tangent.linear_head import LinearHead, apply_head
from forgetcast.tangent.spectrum import Spectrum, spectrum_of


@dataclass(frozen=True, eq=False)
class SpectralAnchor:
    """What one finished task leaves behind, data-free: `S = Sigma V^T` of its top modes and its head.

    Attributes:
        root: S (k_G, rows), `S^T S` being the task's second moments cut to its top modes.
        weight: W_tau (rows, C), the head that the task ended with.
    """

    root: Float[Tensor, "k rows"]
    weight: Float[Tensor, "rows C"]

    @staticmethod
    def of(features: Features, head: LinearHead, modes: int) -> "SpectralAnchor":
        """The anchor of a task whose training has just ended. Cost: one pass and one factorisation.

        Args:
            features: the task's samples, or probes of them; targets are not used.
            head: the head now.
            modes: k_G, number of sample modes to hold; more than there are means all, 0 means none.
        """
        require_integer("modes", modes)
        weight = head.stacked()
        return SpectralAnchor.from_spectrum(spectrum_of(features, len(weight)), head, modes)

    @staticmethod
    def from_spectrum(spectrum: Spectrum, head: LinearHead, modes: int) -> "SpectralAnchor":
        """The anchor from a spectrum at hand, such as that of a forecast."""
        count = min(modes, spectrum.rank)
        kept = spectrum.values[:count].sqrt()[:, None] * spectrum.vectors[:, :count].T
        return SpectralAnchor(kept, head.stacked().to(kept.device))

    @property
    def modes(self) -> int:
        """Number of sample modes k_G."""
        return len(self.root)

    def penalty(self, strength: float) -> QuadraticPenalty:
        """`(mu / k) ||S (W - W_tau)||^2` with k = C k_G, as a penalty for a forecast or a training.

        Args:
            strength: mu.
        """
        require_number("strength", strength)
        scale = (2 * strength / max(self.modes * self.weight.shape[1], 1)) ** 0.5
        return QuadraticPenalty(scale * self.root, scale * self.root @ self.weight)

    def grow(self, outputs: int) -> "SpectralAnchor":
        """The same anchor for a head grown to `outputs`: new outputs are held at 0 on the old samples."""
        require_integer("outputs", outputs, least=self.weight.shape[1])
        extra = self.weight.new_zeros(len(self.weight), outputs - self.weight.shape[1])
        return SpectralAnchor(self.root, torch.cat([self.weight, extra], 1))


@dataclass(frozen=True, eq=False)
class SpectralProbe:
    """The probe form: works on outputs, so for any model; needs the probe inputs to be stored.

    Attributes:
        modes: U (n_probe, k_G), eigenvectors of the probes' Gram.
        reference: `U^T f_ref` (k_G, C).
    """

    modes: Float[Tensor, "n k"]
    reference: Float[Tensor, "k C"]

    @staticmethod
    def of(features: Features, head: LinearHead, modes: int) -> "SpectralProbe":
        """Probe modes and reference outputs of a linear head. Cost: one factorisation; memory n_probe k_G."""
        require_integer("modes", modes)
        phi, _ = features.gather()
        weight = head.stacked()
        spectrum = spectrum_of(Features(phi), len(weight))
        count = min(modes, spectrum.rank)
        basis = spectrum.vectors[:, :count] * spectrum.values[:count].rsqrt()
        U = apply_head(basis, phi.double())
        return SpectralProbe(U, U.T @ head.logits(phi.double()))

    def loss(self, outputs: Float[Tensor, "n C"], strength: float) -> Float[Tensor, ""]:
        """`(mu / k) ||U^T (f - f_ref)||^2`, k = C k_G; differentiable in `outputs`.

        Raises:
            ValueError: outputs of other probes or of another head.
        """
        require_number("strength", strength)
        if outputs.shape != (len(self.modes), self.reference.shape[1]):
            raise complaint(
                f"outputs of shape {tuple(outputs.shape)} for {len(self.modes)} probes and {self.reference.shape[1]} "
                "outputs",
                f"({len(self.modes)}, {self.reference.shape[1]})",
                "Give the model's outputs on the probes themselves, in their order.",
            )
        gap = self.modes.to(outputs).T @ outputs - self.reference.to(outputs)
        return strength / max(gap.numel(), 1) * gap.square().sum()


def combined_penalty(penalties: list[QuadraticPenalty], most_rows: int | None = None) -> QuadraticPenalty:
    """Several anchors as one penalty in bounded memory.

    Args:
        penalties: of all earlier tasks, grown to the same outputs.
        most_rows: rows kept. None keeps d (+ 1) at most, which is exact for any number of tasks; fewer is an
            approximation that drops the weakest directions.

    Raises:
        ValueError: nothing to combine, or penalties on heads of different shapes.
    """
    if not penalties or len({(p.root.shape[1], p.target.shape[1]) for p in penalties}) > 1:
        shapes = [(p.root.shape[1], p.target.shape[1]) for p in penalties]
        raise complaint(
            f"penalties on weights of shapes {shapes}", "at least one, all of equal shape", "Grow the anchors first."
        )
    if most_rows is not None:
        require_integer("most_rows", most_rows, least=1)
    stacked = QuadraticPenalty(
        torch.cat([p.root for p in penalties]),
        torch.cat([p.target for p in penalties]),
        sum(p.constant for p in penalties),
    )
    rows = stacked.root.shape[1]
    bound = rows if most_rows is None else min(most_rows, rows)
    return stacked if len(stacked.root) <= bound else stacked.compressed(bound)
