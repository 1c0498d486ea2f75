r"""Where a training takes the parameters of a model that is linear in them: a network frozen at its tangent.

    outputs(theta + delta) = outputs(theta) + J delta

Squared loss in closed form by Krylov spaces, which need J only as products; everything else by running the training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.forecast.simulate import batches, loss_error, run_training
from forgetcast.forecast.training import ClosedForm, GradientDescent, Minibatch, clip_gradients, data_curvature, sgd
from forgetcast.tangent.krylov import Filter, KrylovSpace, krylov_space
from forgetcast.tangent.leading import leading_modes
from forgetcast.tangent.products import Tangent, TangentMatrix


@dataclass(frozen=True, eq=False)
class Displacement:
    """How far a frozen-tangent training moves the parameters.

    Attributes:
        deltas: (t, P) float64, one for each value of the training's dial.
        spaces: the Krylov spaces of a closed form: of the residual, and of the decay toward zero if there is one.
        side: "dual" (samples x outputs), "primal" (parameters) or "simulation".
    """

    deltas: Float[Tensor, "t P"]
    spaces: tuple[KrylovSpace, ...]
    side: str


@dataclass(frozen=True, eq=False)
class Quadratic:
    r"""The squared loss of a frozen tangent, its gradient and its curvature.

        H = c J^T J + shift,    g = c J^T r + decay theta,    delta = -phi(H) g

    Attributes:
        tangent: J, of the outputs that the loss sees.
        residual: r = outputs - targets (n, c), float64.
        theta: (P,) the parameters at the start, float64.
        training: which filter phi, which decay.
    """

    tangent: Tangent
    residual: Float[Tensor, "n c"]
    theta: Float[Tensor, " P"]
    training: ClosedForm

    @property
    def scale(self) -> float:
        """The factor c of the curvature, by the training's loss convention."""
        return self.training.data_weight * data_curvature(self.training.reduction, *self.residual.shape)

    @property
    def shift(self) -> float:
        """Curvature that weight decay and drift penalty add."""
        return self.training.weight_decay + self.training.drift_penalty

    def phi(self, dial: float) -> Filter:
        """The training's filter, of eigenvalues of J^T J; it raises where the learning rate is unstable."""

        def filtered(s: Tensor) -> Tensor:
            curvatures = self.scale * s + self.shift
            self.training.check_stable(float(curvatures.max()))
            return self.training.filter(curvatures, dial)

        return filtered

    def moves(self, dial: float) -> bool:
        """Whether the training moves anything: not in no steps, or no time."""
        return bool((self.training.filter(torch.tensor([0.0, 1.0], dtype=torch.float64), dial) != 0).any())

    def slope(self, dial: float) -> Filter:
        """`(phi(s) - phi(0)) / s`; its value at 0 is multiplied by nothing and set to 0."""
        phi = self.phi(dial)

        def divided(s: Tensor) -> Tensor:
            change = phi(s) - phi(torch.zeros_like(s))
            return torch.where(s > 0, change / s.clamp_min(torch.finfo(s.dtype).tiny), 0.0)

        return divided


def closed_displacement(
    tangent: Tangent,
    residual: Float[Tensor, "n c"],
    theta: Float[Tensor, " P"],
    training: ClosedForm,
    dials: Sequence[float],
    *,
    tolerance: float = 1e-6,
    most: int = 1000,
    product_type: torch.dtype = torch.float64,
    side: str | None = None,
) -> Displacement:
    r"""Squared loss in closed form, from one Krylov space for all `dials` (two with a decay toward zero).

        dual      delta = -J^T [c phi(K) r] - decay [phi(0) theta + J^T psi(K) J theta],   K = J J^T
        primal    delta = -phi(J^T J) [c J^T r + decay theta]

    with phi(s) the filter at curvature `c s + shift` and psi(s) = (phi(s) - phi(0)) / s. The kernel is never formed.

    Args:
        tangent: J at the start of the training, of the outputs that the loss sees.
        residual: outputs - targets.
        theta: the parameters at the start.
        training: with a closed form.
        dials: steps, times or penalties.
        tolerance: of the Krylov space.
        most: products at most, for each space.
        product_type: type in which the products of J are rounded.
        side: "dual" or "primal"; by default the smaller of the two spaces.

    Raises:
        ValueError: an unstable learning rate (names the largest stable one).

    Cost: one `J v` and one `J^T u` a product; about `sqrt(5 curvature time)` products, see `krylov_space`.
    Source: arXiv 2606.18024, Proposition 1, for ridge; the others derived.
    """
    problem = Quadratic(tangent, residual.double(), theta.double(), training)
    phis = [problem.phi(dial) for dial in dials]
    moving = [problem.moves(dial) for dial in dials]
    decays = [training.decay(dial) for dial in dials]
    dual = residual.numel() <= len(theta) if side is None else side == "dual"

    def space(kernel: Callable[[Tensor], Tensor], start: Tensor, filters: Sequence[Filter]) -> KrylovSpace:
        wanted = list(compress(filters, moving))
        try:
            return krylov_space(kernel, start, wanted, tolerance=tolerance, most=most, product_type=product_type)
        except ValueError:  # an early Ritz value may prove a rate unstable, but not say which rate is stable
            largest = float(leading_modes(tangent.kernel, tuple(residual.shape), 1, device=residual.device).values[0])
            training.check_stable(problem.scale * largest + problem.shift)
            raise

    def curvature(v: Tensor) -> Tensor:
        return tangent.between(v, lambda _, moved: moved)

    if not dual:
        spaces = [space(curvature, tangent.transpose(problem.residual), phis)]
        deltas = -problem.scale * torch.stack([spaces[0].apply(phi) for phi in phis])
        if any(decays):
            spaces.append(space(curvature, problem.theta, phis))
            deltas -= torch.stack([decay * spaces[1].apply(phi) for decay, phi in zip(decays, phis, strict=True)])
        return Displacement(deltas, tuple(spaces), "primal")
    spaces = [space(tangent.kernel, problem.residual, phis)]
    moved = problem.scale * torch.stack([spaces[0].apply(phi) for phi in phis])
    rest = torch.zeros(1, dtype=torch.float64)
    if any(decays):
        slopes = [problem.slope(dial) for dial in dials]
        spaces.append(space(tangent.kernel, tangent.forward(problem.theta), slopes))
        moved += torch.stack([decay * spaces[1].apply(psi) for decay, psi in zip(decays, slopes, strict=True)])
    deltas = -tangent.transpose(moved)
    for delta, decay, phi in zip(deltas, decays, phis, strict=True):
        delta -= decay * float(phi(rest)) * problem.theta if decay else 0.0
    return Displacement(deltas, tuple(spaces), "dual")


def simulated_displacement(
    tangent: Tangent,
    targets: Tensor,
    outputs: int,
    theta: Float[Tensor, " P"],
    training: GradientDescent | Minibatch,
    steps: Sequence[int],
) -> Displacement:
    r"""Any loss and optimiser, by running the training on `outputs(theta) + J delta`.

    Args:
        tangent: J at the start, of the outputs that the loss sees; a matrix where there are minibatches.
        targets: labels (n,) or values (n, outputs).
        outputs: of the whole model.
        theta: the parameters at the start.
        training: any but gradient flow and ridge.
        steps: after which the displacement is wanted, in any order.

    Raises:
        ValueError: minibatches without a matrix, targets that do not fit, a training that diverges.

    Cost a step: one `J v` and one `J^T u`, of the batch alone where J is a matrix.
    Source: frozen-tangent training, the network form of the exact recursion for linear heads.
    """
    start = theta.double()
    value = tangent.value().double()
    _, error = loss_error(training, targets, outputs, value)
    moving = start.clone()
    optimizer: torch.optim.Optimizer
    if isinstance(training, GradientDescent):
        optimizer, order = sgd(training, [moving]), None
    else:
        optimizer, order = training.optimizer([moving]), batches(training, len(value))

    def set_gradient(_: int) -> None:
        batch = None if order is None else next(order)
        part = tangent if batch is None else _rows(tangent, batch)
        u = error((value if batch is None else value[batch]) + part.forward(moving - start), batch)
        moving.grad = part.transpose(u)
        if training.drift_penalty:
            moving.grad.add_(moving - start, alpha=training.drift_penalty)
        clip_gradients(training, [moving])

    rising = sorted(set(steps))
    deltas = run_training(training, optimizer, set_gradient, rising, lambda: (moving - start)[:, None])
    return Displacement(torch.stack([deltas[rising.index(step)][:, 0] for step in steps]), (), "simulation")


def _rows(tangent: Tangent, batch: Tensor) -> TangentMatrix:
    if not isinstance(tangent, TangentMatrix):
        raise complaint(
            "a training in minibatches with the tangent as products only",
            "the Jacobian as a matrix, whose rows a minibatch takes",
            "Give form='explicit' and memory enough for it, or fewer new samples.",
        )
    return tangent.at(batch)
