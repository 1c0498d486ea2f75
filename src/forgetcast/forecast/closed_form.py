r"""The squared loss in closed form: weights after any number of steps from one factorisation.

With curvature factor c, Hessian `H = c S + P` (S second moments of the new features, P of a quadratic penalty),
weight decay w, drift penalty l and the gradient `g = c phi^T (phi W - Y) + grad P` at the start,

    Delta W = -V phi(h + w + l) V^T (g + w W),      H = V diag(h) V^T

for every training that is linear in the gradient. In the null space of H the same formula holds with h = 0.
"""

import warnings
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.forecast.path import WeightPath, check_seen, spanned
from forgetcast.forecast.penalty import QuadraticPenalty
from forgetcast.forecast.training import ClosedForm, GradientFlow, Ridge, data_curvature
from forgetcast.tangent.features import Features, target_matrix
from forgetcast.tangent.linear_head import LinearHead, apply_head, check_width, with_bias
from forgetcast.tangent.moments import stacked_gram
from forgetcast.tangent.spectrum import Curvature, Spectrum, spectrum_of_gram, spectrum_of_rows


@dataclass(frozen=True, eq=False)
class Reading:
    """What one pass over the new features leaves.

    Attributes:
        moments: S, the second moments.
        slope: (rows, C) `phi^T (phi W - Y)` at the weights it was read with, float64.
        rows: number of samples.
    """

    moments: Curvature
    slope: Float[Tensor, "rows C"]
    rows: int

    def moved(self, step: Float[Tensor, "rows C"]) -> "Reading":
        """The reading at weights moved by `step`: `slope + S step`, without another pass. Cost: 2 rows^2 C."""
        return replace(self, slope=self.slope + self.moments @ step)


def read(new: Features, head: LinearHead, classes: tuple[int, ...] | None = None) -> Reading:
    """One pass over the new features. Dual (n x n) where there are fewer samples than features.

    Raises:
        ValueError: widths or targets that do not fit, a label outside `classes`, the outputs that the loss sees.
    """
    weight, outputs = head.stacked(), head.outputs
    dual = new.rows is not None and new.rows < len(weight)
    slope = torch.zeros_like(weight)
    total: Tensor | None = None
    rows, kind = 0, torch.float32
    for phi, y in new.blocks():
        check_width(new.name, phi, head)
        if y is not None:
            check_seen(new.name, y, classes)
        kind = phi.dtype
        residual = apply_head(weight, phi) - target_matrix(new.name, y, outputs, phi)
        slope = slope.to(phi.device)
        slope[: phi.shape[1]] += (residual.T @ phi).T  # several times faster than phi^T residual for few outputs
        if len(weight) > phi.shape[1]:
            slope[-1] += residual.sum(0)
        rows += len(phi)
        if not dual:
            part = stacked_gram(phi, len(weight))
            total = part if total is None else total.add_(part)
    if total is None:
        moments = Curvature(None, kind, spectrum_of_rows(with_bias(new.gather()[0], len(weight))))
    else:
        moments = Curvature(total, kind)
    return Reading(moments, slope, rows)


@dataclass(frozen=True, eq=False)
class Directions:
    """The part of the closed form that belongs to some outputs: their Hessian and gradient, rotated once.

    Attributes:
        columns: the outputs.
        spectrum: of the Hessian that these outputs feel.
        slope: `V^T g`; slope_rest is what of g lies outside the span of V.
        weight: `V^T W`; weight_rest likewise.
    """

    columns: list[int]
    spectrum: Spectrum
    slope: Float[Tensor, "k c"]
    slope_rest: Float[Tensor, "rows c"]
    weight: Float[Tensor, "k c"]
    weight_rest: Float[Tensor, "rows c"]

    @staticmethod
    def of(
        columns: list[int], spectrum: Spectrum, slope: Float[Tensor, "rows c"], weight: Float[Tensor, "rows c"]
    ) -> "Directions":
        """Rotate gradient and weights into the eigenvectors. Cost: 4 rows^2 c."""
        V = spectrum.vectors
        rotated_slope, rotated_weight = V.T @ slope, V.T @ weight
        if spectrum.complete:
            nothing = torch.zeros_like(slope)
            return Directions(columns, spectrum, rotated_slope, nothing, rotated_weight, nothing)
        rest = slope - V @ rotated_slope, weight - V @ rotated_weight
        return Directions(columns, spectrum, rotated_slope, rest[0], rotated_weight, rest[1])

    def changes(self, training: ClosedForm, dials: list[float]) -> list[Float[Tensor, "rows c"]]:
        """Change of these outputs' weights for each dial, in one product. Cost: 2 rows^2 c each."""
        shift = training.drift_penalty + training.weight_decay
        values = torch.where(self.spectrum.values > self.spectrum.floor, self.spectrum.values, 0.0)
        curvatures = torch.cat([values, values.new_zeros(1)]) + shift  # the last stands for what V does not span
        phis = [training.filter(curvatures, dial) for dial in dials]
        decays = [training.decay(dial) for dial in dials]
        rotated = [phi[:-1, None] * (self.slope + decay * self.weight) for phi, decay in zip(phis, decays, strict=True)]
        moved = list(torch.split(self.spectrum.vectors @ -torch.cat(rotated, 1), len(self.columns), 1))
        if not self.spectrum.complete:
            for step, phi, decay in zip(moved, phis, decays, strict=True):
                step -= phi[-1] * (self.slope_rest + decay * self.weight_rest)
        return moved


@dataclass(frozen=True, eq=False)
class Part:
    """Some outputs, which share one Hessian `scale * curvature`.

    Attributes:
        columns: the outputs.
        curvature: the Hessian up to `scale`.
        scale: see above.
        slope: g, their gradient at the start.
        weight: their weights at the start.
    """

    columns: list[int]
    curvature: Curvature
    scale: float
    slope: Float[Tensor, "rows c"]
    weight: Float[Tensor, "rows c"]

    @cached_property
    def directions(self) -> Directions:
        """Gradient and weights along the eigenvectors of the Hessian."""
        spectrum = self.curvature.spectrum
        hessian = Spectrum(self.scale * spectrum.values, spectrum.vectors, self.scale * spectrum.floor)
        return Directions.of(self.columns, hessian, self.slope, self.weight)

    def converges(self, training: ClosedForm, dial: float) -> bool:
        """Whether `training` has converged in every direction, all of them well above the noise: then `solution` holds.

        Also proves the learning rate stable. Cost: 2/3 rows^3, a fraction of the eigenvectors' 9 rows^3.
        """
        between = training.converged_between(dial)
        if between is None or self.curvature.decomposed or self.curvature.matrix is None:
            return False
        shift = training.drift_penalty + training.weight_decay
        noise = torch.finfo(self.curvature.product_type).eps * float(self.curvature.matrix.trace())
        least = max((between[0] - shift) / self.scale, 10 * noise)
        return self.curvature.lies_between(least, (between[1] - shift) / self.scale)

    def solution(self, training: ClosedForm, dial: float) -> Float[Tensor, "rows c"]:
        """Where the training converges to: `-(H + shift)^-1 (g + decay W)`. Cost: rows^3 / 3 + 2 rows^2 c."""
        assert self.curvature.matrix is not None
        hessian = self.scale * self.curvature.matrix
        hessian.diagonal().add_(training.drift_penalty + training.weight_decay + training.stiffness(dial))
        pull = self.slope + training.decay(dial) * self.weight
        return -torch.cholesky_solve(pull, torch.linalg.cholesky(hessian))


@dataclass(frozen=True, eq=False)
class ClosedPath(WeightPath):
    """Weights along a closed-form training, for any value of its dial (steps, time or penalty).

    Attributes:
        training: what is run.
        parts: outputs that the loss sees, and the others if there are any.
        moments: second moments of the new features.
        outputs: C.
        converged: whether the training has converged at its end, so that a linear solve replaces the eigenvectors.
    """

    training: ClosedForm
    parts: tuple[Part, ...]
    moments: Curvature
    outputs: int
    converged: bool

    @property
    def form(self) -> str:
        """Primal (d x d) or dual (n x n)."""
        return "dual" if self.moments.matrix is None else "primal"

    @property
    def new_spectrum(self) -> Spectrum:
        """Spectrum of the second moments of the new features."""
        return self.moments.spectrum

    def changes(self, dials: list[float]) -> list[Float[Tensor, "rows C"]]:
        """Delta W for each value of the dial. Cost: 2 rows^2 C each."""
        seen, *others = self.parts
        if self.converged and dials == [self.final]:
            moved = [(seen, [seen.solution(self.training, self.final)])]
        else:
            _warn_of_noise(self.training, seen.directions.spectrum, dials)
            moved = [(seen, seen.directions.changes(self.training, dials))]
        moved += [(part, part.directions.changes(self.training, dials)) for part in others]
        wholes = [seen.slope.new_zeros(len(seen.slope), self.outputs) for _ in dials]
        for part, steps in moved:
            for whole, own in zip(wholes, steps, strict=True):
                whole[:, part.columns] = own
        return wholes


def closed_path(
    training: ClosedForm,
    reading: Reading,
    weight: Float[Tensor, "rows C"],
    penalty: QuadraticPenalty | None = None,
) -> ClosedPath:
    """The weights along the whole training, from a reading of the new features at `weight`.

    Cost: 4 rows^2 C to rotate; with a penalty another factorisation, about 9 rows^3.

    Raises:
        ValueError: an unstable learning rate (names the largest stable one).
    """
    outputs = weight.shape[1]
    columns = sorted(training.classes) if training.classes is not None else list(range(outputs))
    scale = training.data_weight * data_curvature(training.reduction, reading.rows, len(columns))
    moments = reading.moments
    weight = weight.to(reading.slope.device)
    slope = scale * reading.slope
    if penalty is None:
        seen = Part(columns, moments, scale, slope[:, columns], weight[:, columns])
        held, rest = _flat(slope), torch.zeros_like(slope)
    else:
        held = Curvature(penalty.hessian().to(slope), torch.float64)
        rest = penalty.gradient(weight)
        seen = Part(columns, _sum(scale, moments, held), 1.0, (slope + rest)[:, columns], weight[:, columns])
    parts = [seen]
    unseen = sorted(set(range(outputs)) - set(columns))
    if unseen:
        parts.append(Part(unseen, held, 1.0, rest[:, unseen], weight[:, unseen]))
    final = float(getattr(training, training.dial))
    converged = seen.converges(training, final)
    if not converged:
        steepest = seen.scale * float(seen.curvature.spectrum.values[0])
        training.check_stable(steepest + training.weight_decay + training.drift_penalty)
    return ClosedPath(final, spanned(training, penalty), training, tuple(parts), moments, outputs, converged)


def _flat(like: Float[Tensor, "rows C"]) -> Curvature:
    return Curvature(None, like.dtype, Spectrum(like.new_zeros(0), like.new_zeros(len(like), 0), 0.0))


def _sum(scale: float, data: Curvature, held: Curvature) -> Curvature:
    """`scale data + held`, decomposed, with the noise of the data: the penalty adds none."""
    assert held.matrix is not None
    whole = spectrum_of_gram(scale * data.dense() + held.matrix, torch.float64)
    return Curvature(None, torch.float64, replace(whole, floor=max(whole.floor, scale * data.spectrum.floor)))


def _warn_of_noise(training: ClosedForm, hessian: Spectrum, dials: list[float]) -> None:
    """Warn where a training resolves curvatures that are rounding noise of single-precision products.

    Noise lies in every direction; what is small beside `1 / reach` (the curvature at which the filter saturates) is
    harmless, and so is a spectrum that ends well above the noise.
    """
    values = hessian.values
    single = len(values) > 0 and hessian.floor > 1e-12 * float(values[0])
    if not single or not dials or float(values[-1]) > 10 * hessian.floor:
        return
    if isinstance(training, Ridge):
        reach = 1 / min(dials) if min(dials) > 0 else float("inf")
    elif isinstance(training, GradientFlow):
        reach = max(dials)
    else:
        rate = training.learning_rate
        total = rate * max(dials) if isinstance(rate, float | int) else sum(rate[: int(max(dials))])
        reach = total / (1 - training.momentum)
    if reach * hessian.floor > 0.01:
        warnings.warn(
            f"this training resolves curvatures down to {1 / reach:.2g}, but those below {hessian.floor:.2g} are "
            "rounding noise of products in float32 and count as zero; give the features in float64 for an exact "
            "forecast, or train less far (fewer steps, a larger penalty)",
            stacklevel=6,
        )
