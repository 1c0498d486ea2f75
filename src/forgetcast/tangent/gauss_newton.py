r"""Curvature of a loss through the tangent: the Gauss-Newton product, which for cross-entropy is the Fisher product.

G = J^T H J,        H = d^2 loss / d outputs^2, block-diagonal in samples
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.tangent.products import Middle, Tangent


def softmax_hessian(f: Float[Tensor, "b c"], u: Float[Tensor, "*k b c"]) -> Float[Tensor, "*k b c"]:
    """`(diag p - p p^T) u` for every sample, p = softmax(f): second derivative of the summed cross-entropy."""
    p = torch.softmax(f.to(u), -1)
    return p * (u - (p * u).sum(-1, keepdim=True))


def squared_hessian(f: Float[Tensor, "b c"], u: Float[Tensor, "*k b c"]) -> Float[Tensor, "*k b c"]:  # noqa: ARG001
    """`2 u`: second derivative of the summed squared error (without a half)."""
    return 2 * u


def gauss_newton(
    tangent: Tangent,
    hessian: Middle = softmax_hessian,
    *,
    scale: float = 1.0,
    inverse_root: Float[Tensor, " P"] | None = None,
) -> Callable[[Tensor], Tensor]:
    r"""The product `v -> scale D^{-1/2} J^T H J D^{-1/2} v`, symmetric and positive semi-definite.

    Args:
        tangent: J.
        hessian: H of the summed loss, sample by sample.
        scale: `1 / n` for a mean over samples.
        inverse_root: `D^{-1/2}`, of a diagonal preconditioner such as Adam's `sqrt(v) + eps`; None for D = I.

    Cost: one `J v` and one `J^T u` in one sweep over the samples.
    """

    def product(v: Tensor) -> Tensor:
        if inverse_root is None:
            return scale * tangent.between(v, hessian)
        root = inverse_root.to(v)
        return scale * root * tangent.between(root * v, hessian)

    return product
