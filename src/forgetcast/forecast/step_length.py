r"""How far to go along a given direction: theta(alpha) = theta_old + alpha d.

    old loss + new loss, weighted:   alpha* = -(w g_old . d + g_new . d) / (w d^T H_old d + d^T H_new d)

exact for quadratics, and so for a network at its tangent. It answers another question than how many parameters to train
(`forecast/magnitude.py`): here tasks that point the same way permit a longer step.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_number

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Quadratic:
    """A loss near the old parameters: g . d + d^T H d / 2.

    Attributes:
        gradient: g (P,).
        curvature: v -> H v; for a network for example `fc.gauss_newton(...)`.
    """

    gradient: Float[Tensor, " P"]
    curvature: Product

    def along(self, direction: Float[Tensor, " P"]) -> tuple[float, float]:
        """Slope g . d and curvature d^T H d. Cost: one product.

        Raises:
            ValueError: a direction of another length, numbers that are not finite, a curvature below zero.
        """
        if direction.shape != self.gradient.shape:
            raise complaint(
                f"a direction {tuple(direction.shape)} for a gradient {tuple(self.gradient.shape)}",
                "one number a parameter in both",
                "Flatten the same parameters.",
            )
        slope = float((self.gradient.double() @ direction.double()).detach())
        bend = float((direction.double() @ self.curvature(direction).double()).detach())
        require_number("g . d", slope, least=-float("inf"))
        rounding = -1e-9 * float(direction.double().square().sum())
        require_number("d^T H d", bend, least=rounding)
        return slope, max(bend, 0.0)


def step_length(
    old: Quadratic, new: Quadratic, direction: Float[Tensor, " P"], weight: float = 1.0
) -> tuple[float, float]:
    """The step with the least weighted sum of old and new loss, and by how much it lowers it.

    Args:
        old: at the old parameters.
        new: likewise.
        direction: d, for example from the old parameters to those after training.
        weight: w, of the old loss; t - 1 makes all of t tasks count alike.

    Returns:
        alpha*, and the weighted sum at the start minus at alpha*.

    Raises:
        ValueError: a direction without curvature along it, such as zeros; as `Quadratic.along`.
    """
    require_number("weight", weight)
    (old_slope, old_bend), (new_slope, new_bend) = old.along(direction), new.along(direction)
    slope, bend = weight * old_slope + new_slope, weight * old_bend + new_bend
    if bend <= 0:
        raise complaint(
            "a direction along which neither loss bends",
            "one with curvature",
            "Give a direction that changes outputs, and a weight that lets a bent loss count.",
        )
    return -slope / bend, slope**2 / (2 * bend)


@dataclass(frozen=True)
class StepLengths:
    """Best steps along the way to task 2's interpolating solution.

    Attributes:
        old: least expected error of task 1.
        new: of task 2.
        both: of the weighted sum.
    """

    old: float
    new: float
    both: float


def expected_step_lengths(ratio: float, cosine: float, noise: float = 0.0, weight: float = 1.0) -> StepLengths:
    r"""Expected best steps of the linear model, more parameters than samples.

        old:  r c / (1 + nu)      new:  1 / (1 + nu)      both:  (w r c + 1) / ((w + 1) (1 + nu))

    With r = 0 (task 1 is fitted already), nu = 0 and w = t - 1 that is 1 / t: averaging of models.

    Args:
        ratio: r = |theta_1 - theta_old| / |theta_2 - theta_old|.
        cosine: c, between the two: of the gradients at theta_old, for isotropic features.
        noise: nu = sigma^2 P / ((P - n - 1) |theta_2 - theta_old|^2).
        weight: w, of task 1.
    """
    require_number("ratio", ratio)
    require_number("cosine", cosine, least=-1.0, most=1.0)
    require_number("noise", noise)
    require_number("weight", weight)
    old, new = ratio * cosine / (1 + noise), 1 / (1 + noise)
    return StepLengths(old, new, (weight * old + new) / (weight + 1))
