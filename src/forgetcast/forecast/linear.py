"""The exact forecast for a linear head on frozen features."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_integer
from forgetcast.forecast.modes import Certificate, Modes, Order, VulnerableRank, certificate, mode_table
from forgetcast.forecast.modes import vulnerable_rank as vulnerable_rank_of
from forgetcast.forecast.path import Change, WeightPath, check_classes, describe, dial_values
from forgetcast.forecast.penalty import QuadraticPenalty
from forgetcast.forecast.result import Cost, Forecast
from forgetcast.forecast.route import weight_path
from forgetcast.forecast.training import Training
from forgetcast.tangent.features import Features, check_targets
from forgetcast.tangent.linear_head import LinearHead, apply_head, check_width
from forgetcast.tangent.moments import stacked_gram, streamed_gram
from forgetcast.tangent.spectrum import Overlap, Spectrum, overlap, spectrum_of, spectrum_of_gram


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Forecasts along a training, from one factorisation or one simulation.

    Attributes:
        dial: what varies: "steps", "time" or "penalty".
        values: its values.
        changes: Delta W (rows, C) at each of them.
    """

    dial: str
    values: tuple[float, ...]
    changes: tuple[Change, ...]
    _forecast: "LinearForecast"

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> "LinearForecast":
        """The whole forecast at one value. Cost: one pass over the old features."""
        return self._forecast.with_change(self.changes[index], self.dial, self.values[index])

    @cached_property
    def mean_squared_drift(self) -> Float[Tensor, " t"]:
        """`tr(Delta W^T S_old Delta W) / n_old` at each value, from the old second moments. Cost: 2 rows^2 C each."""
        wide = torch.cat(self.changes, 1)  # (rows, t C): one product for all
        energies = (wide * (self._forecast.old_gram @ wide)).sum(0)
        return energies.view(len(self), -1).sum(1).cpu() / len(self._forecast.drift)

    @cached_property
    def accuracy(self) -> Float[Tensor, " t"]:
        """Forecast accuracy of the old samples at each value. Cost: one pass, n_old rows C products a value."""
        return self._forecast.accuracies(self.changes)


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearForecast(Forecast):
    """A `Forecast` of a linear head, with its trajectory, its modes and the overlap of the feature spaces.

    Attributes:
        change: Delta W (rows, C) float64 at the end of the training; the last row is the bias, if there is one.
        head: the head at the start.
    """

    change: Change
    head: LinearHead
    _old: Features
    _old_gram: Float[Tensor, "rows rows"] | None
    _path: WeightPath

    @property
    def head_after(self) -> LinearHead:
        """The head that the training is predicted to end with."""
        start = self.head.stacked()
        return self.head.replaced(start + self.change.to(start.device))

    @cached_property
    def old_gram(self) -> Float[Tensor, "rows rows"]:
        """Second moments of the old features (bias counted as a constant feature). Cost: one pass, n_old rows^2."""
        total = streamed_gram(self._old, len(self.change)) if self._old_gram is None else self._old_gram
        return total.to(self.change.device)

    @cached_property
    def old_spectrum(self) -> Spectrum:
        """Spectrum of the old second moments, from the samples where they are fewer than the features."""
        if self._old.rows is not None and self._old.rows < len(self.change):
            return spectrum_of(self._old, len(self.change))
        return spectrum_of_gram(self.old_gram, self.drift.dtype)

    @cached_property
    def new_spectrum(self) -> Spectrum:
        """Spectrum of the new second moments."""
        return self._path.new_spectrum

    def modes(self, k: int = 10) -> Modes:
        """The first `k` eigenmodes of the old Gram with the forecast drift along each."""
        return mode_table(self.old_spectrum, self.change, k)

    def sample_modes(self, k: int = 10) -> Float[Tensor, "n k"]:
        """Unit eigenvectors u_j of the old Gram, one column each: how strongly each old sample sits in mode j.

        Modes whose eigenvalue is rounding noise are zero columns. Cost: one pass, 2 n_old rows k.
        """
        require_integer("k", k, least=1)
        old = self.old_spectrum
        count = min(k, len(old.values))
        kept = old.values[:count] > old.floor
        scale = torch.where(kept, old.values[:count].clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
        basis = old.vectors[:, :count] * scale
        return torch.cat([apply_head(basis, phi) for phi, _ in self._old.blocks()])

    def vulnerable_rank(self, energy: float = 0.9, order: Order = "eigenvalue") -> VulnerableRank:
        """Fewest old modes, in `order`, that carry the share `energy` of the forecast drift."""
        return vulnerable_rank_of(self.old_spectrum, self.change, energy, order)

    def certificate(self, k: int) -> Certificate:
        """Bounds on the drift outside the first `k` old modes."""
        rank = self.new_spectrum.rank if self._path.within_new else len(self.change)
        return certificate(self.old_spectrum, self.change, k, rank)

    def overlap(self) -> Overlap:
        """NTK overlap (principal angles) of the old and the new feature space."""
        return overlap(self.old_spectrum, self.new_spectrum)

    def at(
        self,
        steps: Sequence[int] | None = None,
        *,
        time: Sequence[float] | None = None,
        penalty: Sequence[float] | None = None,
    ) -> Trajectory:
        """The forecast at several `steps` (descent), `time`s (flow) or `penalty`s (ridge) at once.

        Closed forms take them from the factorisation at hand; simulations run once to the last one.

        Raises:
            ValueError: a dial that this training does not have, a value out of its range.
        """
        dial, values = dial_values(self.settings["training"], self._path.final, steps, time, penalty)
        return Trajectory(dial, values, self._path.at(values), self)

    def with_change(self, change: Change, dial: str, value: float) -> "LinearForecast":
        """The same forecast for another weight change (one point of a trajectory)."""
        started = perf_counter()
        drift = torch.cat([apply_head(change, phi) for phi, _ in self._old.blocks()])
        settings = {**self.settings, "training": {**self.settings["training"], dial: value}}
        cost = Cost(perf_counter() - started, {"old": 1, "new": 0}, self.cost.form)
        return replace(self, drift=drift, settings=settings, cost=cost, change=change)

    def accuracies(self, changes: Sequence[Change]) -> Float[Tensor, " t"]:
        """Accuracy of the old samples for several weight changes, in one pass over the old features.

        Neighbouring points of a trajectory span few directions q: products with n_old rows q C instead of one each.
        """
        labels, outputs = self.labels, self.head.outputs
        basis, mix = common_basis(changes, torch.finfo(self.drift.dtype).eps)
        hits = torch.zeros(len(changes), dtype=torch.int64, device=labels.device)
        row = 0
        for block, _ in self._old.blocks():
            for phi in torch.split(block, 1024):  # what is multiplied next stays in the cache
                part = slice(row, row + len(phi))
                moved = apply_head(basis, phi).view(len(phi), -1, outputs).transpose(0, 1).flatten(1)  # (q, n C)
                logits = torch.addmm(self.logits_before[part].reshape(1, -1), mix.to(phi), moved)
                hits += (logits.view(-1, len(phi), outputs).argmax(2) == labels[part]).sum(1)
                row += len(phi)
        return hits.double().cpu() / row


def common_basis(changes: Sequence[Change], tolerance: float) -> tuple[Float[Tensor, "rows qC"], Float[Tensor, "t q"]]:
    """Weight changes as mixtures of few: `changes[i] = sum_q mix[i, q] basis_q`, singular values cut at `tolerance`.

    The basis comes as one wide head (rows, q C), so that one product serves all. Cost: t^2 rows C.
    """
    rows, outputs = changes[0].shape
    stacked = torch.stack(list(changes)).flatten(1)
    orthogonal, triangle = torch.linalg.qr(stacked.T)  # the SVD of the small factor is fast
    left, singular, right_vectors = torch.linalg.svd(triangle.T, full_matrices=False)
    kept = max(int((singular > tolerance * singular[0]).sum()), 1)
    basis = orthogonal @ right_vectors[:kept].T  # (rows C, q)
    mix = left[:, :kept] * singular[:kept]
    return basis.view(rows, outputs, kept).transpose(1, 2).reshape(rows, -1), mix


def forecast_linear(
    old: Features,
    new: Features,
    head: LinearHead,
    training: Training,
    penalty: QuadraticPenalty | None = None,
) -> LinearForecast:
    r"""Say what training a linear head on new data will do to its old answers, before the first step. Exact.

        Delta F = phi_old Delta W,    Delta W = -V phi(c s + w + l) V^T g        (squared loss, any linear training)

    Cross-entropy and minibatches are run in feature space: exact as well, see `forgetcast.forecast.simulate`.

    Args:
        old: features (n_old, d) and targets of old samples; targets may be left out (no accuracy then).
        new: features (n_new, d) and targets of the new task.
        head: the head now, (d, C), with all outputs that will be scored (`LinearHead.grow`).
        training: how the new task will be trained.
        penalty: a quadratic penalty of that training, such as the spectral regulariser.

    Returns:
        The forecast: drift and logits in the type of the old features, spectra in float64.

    Raises:
        ValueError: features, targets, head and training that do not fit each other, an unstable learning rate.

    Cost: one pass over the new features with n_new d^2 products and one d x d factorisation (n_new x n_new in the
    dual form, when n_new < d), then one pass over the old features with n_old d C. Memory: one block of features,
    d^2 and n_old C numbers; nothing of the size of samples x outputs squared.

    Source: arXiv 2606.18024, Proposition 1 (ridge); other trainings derived in the same way.

    Examples:
        >>> import numpy as np, forgetcast as fc
        >>> draw = np.random.default_rng(0)
        >>> old = fc.Features(draw.normal(size=(40, 8)), draw.integers(0, 2, 40))
        >>> new = fc.Features(draw.normal(size=(30, 8)), draw.integers(2, 4, 30))
        >>> head = fc.LinearHead(draw.normal(size=(8, 4)), np.zeros(4))
        >>> forecast = fc.forecast_linear(old, new, head, fc.GradientDescent(learning_rate=0.1, steps=50))
        >>> forecast.drift.shape
        torch.Size([40, 4])
    """
    started = perf_counter()
    for features in (old, new):
        if features.is_array:
            check_width(features.name, features.phi, head)
            if features.y is not None or features is new:
                check_targets(features.name, features.y, head.outputs)
    if old.shuffled:
        raise complaint(
            f"{old.name}: a DataLoader with shuffle=True as the old samples",
            "the same order at every pass",
            "Give a DataLoader with shuffle=False: the forecast's rows are in the order of the old samples.",
        )
    check_classes(training, new, head.outputs)
    path = weight_path(new, head, training, penalty)
    (change,) = path.changes([path.final])
    drift, before, targets, old_gram = _read_old(old, head, change)
    settings = {"training": describe(training), "penalty": penalty is not None}
    cost = Cost(perf_counter() - started, {"old": 1, "new": 1}, path.form)
    return LinearForecast(
        drift=drift,
        logits_before=before,
        targets=targets,
        settings=settings,
        cost=cost,
        change=change,
        head=head,
        _old=old,
        _old_gram=old_gram,
        _path=path,
    )


def _read_old(old: Features, head: LinearHead, change: Change) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One pass over the old features: drift, logits now, targets; the Gram too if there is no second pass."""
    weight = head.stacked()
    both = torch.cat([change, weight.to(change)], 1)
    drift, before, targets = [], [], []
    total: Tensor | None = None
    for phi, y in old.blocks():
        check_width(old.name, phi, head)
        moved, now = torch.split(apply_head(both, phi), head.outputs, 1)  # one product of twice the width is faster
        drift.append(moved)
        before.append(now)
        if y is not None:
            targets.append(check_targets(old.name, y, head.outputs))
        if old.read_once:
            part = stacked_gram(phi, len(weight))
            total = part if total is None else total.add_(part)
    return torch.cat(drift), torch.cat(before), torch.cat(targets) if targets else None, total
