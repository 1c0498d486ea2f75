r"""The task-specific gap: error of kernel ridge regression on new samples, expected before any of its samples is drawn.

With the kernel's eigenvalues l_i under the distribution of samples, `E k(x, x') psi_i(x') = l_i psi_i(x)`, and weights
w_i of the target on the orthonormal psi_i, let n samples and the penalty p resolve `d = sum_i n l_i / (kappa + n l_i)`
eigenfunctions, and `d_2 = sum_i (n l_i / (kappa + n l_i))^2`, where kappa is the root of `kappa (1 - d/n) = p`. Then,
with label noise of variance s^2,

    error    = (sum_i w_i^2 / (1 + n l_i / kappa)^2 + s^2) / (1 - d_2/n) - s^2      on new samples, without their noise
    training = (1 - d/n)^2 (error + s^2)                                            on the samples themselves

Where the n samples are drawn from a pool of m without replacement, and the error is that on the others,

    kappa (1 - d/n) = p (1 - d/m),      (1 - d/n) (1 - d/m) + (1/n - 1/m) (d - d_2)   in the place of 1 - d_2/n

An average over draws, for kernels whose features act like Gaussian ones. Those of real data do where the penalty is
not small beside the smaller eigenvalues; without it the curve may run below the measured error. Sources: Bordelon et
al., arXiv 2002.02561, and Canatar et al., arXiv 2006.13198, for the error; Simon et al., arXiv 2110.03922, for both in
this form. The pool is derived here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_finite, require_integer, require_number
from forgetcast.tangent.blocks import TaskKernels, two_axes

ROUNDS = 200
"""Of Newton's method at most; it needs about ten."""


@dataclass(frozen=True, eq=False)
class TargetSpectrum:
    """A kernel and a target on its eigenfunctions.

    Attributes:
        eigenvalues: l (k,), not negative; of `E k(x, x') psi(x') = l psi(x)`.
        weights: w (k, C) of the target's C outputs on the orthonormal eigenfunctions; (k,) is taken as (k, 1). With
            coefficients v on `sqrt(l) psi` these are `sqrt(l) v`. Where l is 0 the target cannot be learnt.
        pool: m, if these are of m samples that stand for the distribution; None if of the distribution.

    Raises:
        ValueError: negative eigenvalues or none above 0, NaN or infinity, weights that do not fit.
    """

    eigenvalues: Tensor
    weights: Tensor
    pool: int | None = None

    def __post_init__(self) -> None:
        values, weights = self.eigenvalues.detach().double(), self.weights.detach().double()
        if values.ndim != 1 or weights.ndim not in (1, 2) or len(weights) != len(values):
            raise complaint(
                f"eigenvalues {tuple(values.shape)} and weights {tuple(weights.shape)}",
                "(k,) and (k, C)",
                "Give one weight, or one row of them, for each eigenfunction.",
            )
        require_finite("eigenvalues", values)
        require_finite("weights", weights)
        if bool((values < 0).any()) or not bool((values > 0).any()):
            raise complaint(
                f"eigenvalues from {values.min():.3g} to {values.max():.3g}" if len(values) else "no eigenvalues",
                "none below 0 and one above",
                "Set to 0 what rounding made negative.",
            )
        if self.pool is not None:
            require_integer("pool", self.pool, least=max(2, int((values > 0).sum())))
        object.__setattr__(self, "eigenvalues", values)
        object.__setattr__(self, "weights", two_axes(weights))


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """Expected errors at several numbers of samples: mean squares, summed over outputs.

    Attributes:
        samples: n of each point.
        errors: on new samples, their label noise left out.
        training: on the training samples, label noise included.
        kappas: effective penalty, by what n samples cannot tell apart above the penalty itself; the regression learns
            the part `n l / (kappa + n l)` of an eigenfunction.
    """

    samples: tuple[int, ...]
    errors: Float[Tensor, " points"]
    training: Float[Tensor, " points"]
    kappas: Float[Tensor, " points"]

    @property
    def table(self) -> pd.DataFrame:
        """A row for each n: `error`, `training`, `gap` (error minus training), and `kappa`."""
        columns = {
            "error": self.errors,
            "training": self.training,
            "gap": self.errors - self.training,
            "kappa": self.kappas,
        }
        frame = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()}, index=self.samples)
        return frame.rename_axis("samples")


def learning_curve(
    spectrum: TargetSpectrum, samples: int | Sequence[int], penalty: float, *, noise: float = 0.0
) -> LearningCurve:
    """Expected error of kernel ridge regression after n samples, for one n or several.

    Args:
        spectrum: of kernel and target, from `target_spectrum` or known.
        samples: n, at least 1; fewer than the spectrum's pool has.
        penalty: p in `(K + p I)^{-1}`, of the summed loss; 0 for the interpolation of smallest norm.
        noise: s, standard deviation of the label noise of each output; 0 for a pool, whose targets hold theirs.

    Returns:
        The curve. Without a penalty, at as many samples as eigenvalues above 0, what noise and unlearnable parts of the
        target do is infinite: the peak of double descent.

    Raises:
        ValueError: n below 1 or beyond the pool, a negative penalty or noise.

    Cost: about ten sums over the eigenvalues for each n.

    Examples:
        >>> import torch
        >>> from forgetcast.forecast.learning_curve import TargetSpectrum, learning_curve
        >>> spectrum = TargetSpectrum(torch.tensor([1.0, 0.1, 0.01]), torch.ones(3))
        >>> [round(error, 3) for error in learning_curve(spectrum, [5, 50, 500], penalty=0.1).errors.tolist()]
        [0.944, 0.033, 0.0]
    """
    numbers = torch.as_tensor(samples).flatten().tolist()
    if not numbers:
        raise complaint("no number of samples", "at least one", "Give n, or a list of them.")
    for n in numbers:
        require_integer("samples", n, least=1)
    require_number("penalty", penalty)
    require_noise(noise, spectrum.pool)
    values, energies = spectrum.eigenvalues, spectrum.weights.square().sum(1)
    label_noise = spectrum.weights.shape[1] * noise**2
    points = []
    for n in numbers:
        seen = resolution(values, n, penalty, spectrum.pool)
        whole = seen.error(float(seen.missed.square() @ energies) + label_noise)
        points.append((whole - label_noise, seen.training_error(whole), seen.kappa))
    return LearningCurve(tuple(numbers), *values.new_tensor(points).T)


def target_spectrum(kernel: Float[Tensor, "m m"], targets: Tensor, noise: float = 2.0**-52) -> TargetSpectrum:
    r"""Eigenvalues and target weights from a pool of m samples, which stands for their distribution.

        K = U diag(m l) U^T,      w = U^T y / sqrt(m)

    Args:
        kernel: K of the pool's samples with each other; of a network the trace kernel.
        targets: (m, C) or (m,), what is to be learnt from the start on: targets minus outputs at the start.
        noise: relative rounding error of the kernel, see `TaskKernels`.

    Raises:
        ValueError: no kernel, targets that do not fit it, NaN or infinity.

    Cost: about 9 m^3.
    """
    kernels = TaskKernels(((kernel,),), noise)
    wanted = two_axes(targets.detach().to(kernels.matrix(0, 0)))
    if kernels.full or wanted.ndim != 2 or len(wanted) != len(kernel):
        raise complaint(
            f"targets {tuple(targets.shape)} for a kernel {tuple(kernel.shape)}",
            "(m, C) for a kernel (m, m)",
            "Give one row for each sample of the pool, and of a network the trace kernel.",
        )
    values, vectors = kernels.eigen(0)
    return TargetSpectrum(values / len(kernel), vectors.T @ wanted / len(kernel) ** 0.5, len(kernel))


@dataclass(frozen=True, eq=False)
class Resolution:
    """What n samples tell apart of a kernel's eigenfunctions.

    Attributes:
        kappa: effective penalty.
        missed: (k,) `kappa / (kappa + n l)`, the part of each eigenfunction that is not learnt.
        learnt: (k,) `l / (kappa + n l)`.
        inflation: what the error on new samples is of that of the mean prediction.
        training_root: `1 - d/n`, what a residual is on training samples of what it would be had they been left out.
        left: share of the pool that is not drawn.
    """

    kappa: float
    missed: Float[Tensor, " k"]
    learnt: Float[Tensor, " k"]
    inflation: float
    training_root: float
    left: float

    def error(self, missed: float) -> float:
        """Mean squared error on new samples, noise included, from that of the mean prediction, noise included."""
        return missed * self.inflation if missed > 0 else 0.0

    def training_error(self, error: float) -> float:
        """Mean squared error on the training samples, from that on new ones."""
        return self.training_root**2 * error if self.training_root > 0 else 0.0


def resolution(values: Float[Tensor, " k"], n: int, penalty: float, pool: int | None = None) -> Resolution:
    """The effective penalty of n samples and what follows from it.

    `penalty (1 - d/m) + kappa d/n - kappa` is concave in kappa, so Newton's method from above falls to its largest root
    and never past it.

    Raises:
        ValueError: as many samples as the pool, or more.
    """
    require_integer("samples", n, least=1)
    if pool is not None and n >= pool:
        raise complaint(
            f"{n} samples of a pool of {pool}", "fewer, so that some are left to test on", "Give a larger pool."
        )
    held, share = values > 0, 0.0 if pool is None else n / pool
    rank = int(held.sum())
    if penalty == 0 and n >= rank:  # every eigenfunction is told apart
        kappa, missed, learnt = 0.0, (~held).to(values), held.to(values) / n
        resolved = rank / n
        root = 1 - resolved
    else:
        kappa = _effective_penalty(values, n, penalty, share)
        missed, learnt = kappa / (kappa + n * values), values / (kappa + n * values)
        resolved = float(learnt.sum())
        root = penalty / kappa * (1 - share * resolved)  # 1 - resolved, without its rounding
    kept = root * (1 - share * resolved) + (1 - share) * float((learnt * missed).sum())
    return Resolution(kappa, missed, learnt, 1 / kept if kept > 0 else inf, root, 1 - share)


def _effective_penalty(values: Float[Tensor, " k"], n: int, penalty: float, share: float) -> float:
    kappa = penalty + values.sum()
    for _ in range(ROUNDS):
        parts = values / (kappa + n * values)
        slope = (share * penalty * parts / (kappa + n * values) + n * parts.square()).sum() - 1
        change = (penalty * (1 - share * parts.sum()) + kappa * parts.sum() - kappa) / slope
        kappa = kappa - change
        if abs(float(change)) <= 1e-14 * float(kappa):
            break
    return float(kappa)


def require_noise(noise: float, pool: int | None) -> None:
    """Raise unless the label noise is at least 0, and 0 for a pool."""
    require_number("noise", noise)
    if noise > 0 and pool is not None:
        raise complaint(
            f"got noise={noise} beside a pool", "noise=0", "The targets of the pool's samples hold their noise already."
        )
