r"""Functions of a symmetric positive semi-definite operator K applied to a vector, from products with K (Lanczos).

    K V_m = V_m T_m + beta_m v_{m+1} e_m^T,   v_1 = r / ||r||,        g(K) r  ~  ||r|| V_m g(T_m) e_1

One space serves every g: all step counts, times and penalties of a training. Products grow as `sqrt(time * largest
eigenvalue)` where simulated descent takes `time * largest eigenvalue` of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from forgetcast.checks import complaint, require_integer, require_number

Kernel = Callable[[Tensor], Tensor]
Filter = Callable[[Tensor], Tensor]
_CAUSE = "Look at the outputs of the model, and at the adjoint_gap of its tangent operator."
Status = Literal["converged", "exact", "stopped"]


@dataclass(frozen=True, eq=False)
class KrylovSpace:
    r"""The space of r, K r, ..., K^{m-1} r, in which any function of K acts on r.

    Attributes:
        basis: V_m^T (m, M) orthonormal rows, in the type of r.
        values: (m,) Ritz values, the eigenvalues of T_m, rising; not negative, and zero where they are rounding noise.
        vectors: (m, m) eigenvectors of T_m.
        last: beta_m, which couples the space to what it leaves out.
        norm: ||r||.
        shape: of r.
        products: products with K.
        status: "converged" (to the tolerance), "exact" (nothing is left out of the space) or "stopped" (at the largest
            number of products, short of the tolerance).
        residual: what the worst filter was short of convergence by, see `krylov_space`.
    """

    basis: Float[Tensor, "m M"]
    values: Float[Tensor, " m"]
    vectors: Float[Tensor, "m m"]
    last: float
    norm: float
    shape: torch.Size
    products: int
    status: Status
    residual: float

    def coordinates(self, function: Filter) -> Float[Tensor, " m"]:
        """`||r|| g(T_m) e_1`: the result in the basis."""
        if len(self.values) == 0:
            return self.values
        return self.norm * (self.vectors @ (function(self.values) * self.vectors[0]))

    def apply(self, function: Filter) -> Tensor:
        """`g(K) r` in the shape and type of r. Cost: 2 M m."""
        return (self.coordinates(function).to(self.basis) @ self.basis).reshape(self.shape)

    def defect(self, function: Filter) -> float:
        r"""`beta_m |e_m^T g(T_m) e_1|`: what the space misses, relative to ||r||.

        For `g = 1 / (s + lambda)` this is `||r - (K + lambda) z|| / ||r||` exactly; for gradient flow and descent it is
        the defect of `z' = r - K z` at the end of the training.
        """
        return self.last * abs(float(self.coordinates(function)[-1])) / self.norm if len(self.values) else 0.0


def krylov_space(
    kernel: Kernel,
    r: Tensor,
    filters: Sequence[Filter],
    *,
    tolerance: float = 1e-6,
    most: int = 1000,
    product_type: torch.dtype | None = None,
) -> KrylovSpace:
    r"""Grow the Krylov space of r until every filter has converged in it.

    A filter has converged when its defect (`KrylovSpace.defect`) and the change of its result since a few products
    ago, relative to the result, are both at most `tolerance`. Reorthogonalised fully, twice.

    Args:
        kernel: u -> K u, in the shape of r; symmetric and positive semi-definite.
        r: the vector, of any shape; float64 unless memory forbids.
        filters: what `g(K) r` is wanted for: pre-image filters, (m,) float64 eigenvalues to values, such as `filter` of
            a training. For `h(K) = K g(K)`, such as `1 - exp(-time s)`, give g here and apply h to the space: h is
            nearly constant where g is not, and would look converged at once.
        tolerance: see above.
        most: products at most. The space never has more dimensions than r.
        product_type: type in which products are rounded (that of the model); by default that of r. Ritz values below
            its `eps` times the largest count as zero.

    Returns:
        The space; r = 0, or no filters, take no product.

    Raises:
        ValueError: a tolerance or `most` out of range; products that are not finite, or not those of such an operator.

    Cost: m products, 4 M m^2 flops, M m numbers.
    Source: Lanczos; error of matrix functions Hochbruck & Lubich, SIAM J. Numer. Anal. 34 (1997); defect as a bound
    Jawecki, Auzinger & Koch, BIT 60 (2020).
    """
    require_number("tolerance", tolerance, strict=True)
    require_integer("most", most, least=1)
    start = r.flatten()
    norm = float(torch.linalg.vector_norm(start, dtype=torch.float64))
    nothing = torch.zeros(0, dtype=torch.float64)
    if norm == 0 or not filters:
        empty = start.new_zeros(0, len(start))
        return KrylovSpace(empty, nothing, nothing.view(0, 0), 0.0, norm, r.shape, 0, "exact", 0.0)
    eps = torch.finfo(product_type or r.dtype).eps
    most = min(most, len(start))
    basis = start.new_empty(min(most, 32), len(start))
    basis[0] = start / norm
    diagonal: list[float] = []
    coupling: list[float] = []
    before, check = [nothing] * len(filters), 1
    while True:
        m = len(diagonal) + 1
        image = kernel(basis[m - 1].reshape(r.shape)).flatten().to(basis)
        diagonal.append(float(image @ basis[m - 1]))
        for _ in range(2):
            image = image - basis[:m].T @ (basis[:m] @ image)
        coupling.append(float(torch.linalg.vector_norm(image)))
        if not isfinite(coupling[-1]):
            raise complaint(f"a product with the operator that is not finite, the {m}th", "finite numbers", _CAUSE)
        exact = m == len(start) or coupling[-1] <= 10 * eps * max(*diagonal, *coupling)
        if exact or m in (check, most):
            values, vectors = _eigen(diagonal, coupling[:-1], eps)
            space = KrylovSpace(basis[:m], values, vectors, coupling[-1], norm, r.shape, m, "exact", 0.0)
            if exact:
                return space
            now = [space.coordinates(function) for function in filters]
            residual = max(map(_unsettled, map(space.defect, filters), now, before))
            if residual <= tolerance or m == most:
                return replace(space, residual=residual, status="converged" if residual <= tolerance else "stopped")
            before, check = now, m + max(1, m // 10)
        if m == len(basis):
            basis = torch.cat([basis, torch.empty_like(basis)])
        basis[m] = image / coupling[-1]


def _unsettled(defect: float, now: Float[Tensor, " m"], before: Float[Tensor, " l"]) -> float:
    """The larger of the defect and the relative change of the result since the last look."""
    change = now.clone()
    change[: len(before)] -= before
    size = float(now.norm())
    return max(defect, float(change.norm()) / size if size > 0 else 0.0)


def _eigen(
    diagonal: Sequence[float], coupling: Sequence[float], eps: float
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m m"]]:
    """Eigenvalues, rounding noise set to zero, and eigenvectors of T_m."""
    found, vectors = eigh_tridiagonal(np.array(diagonal), np.array(coupling))
    values = torch.from_numpy(found)
    largest = float(values.abs().max())
    if not float(values[0]) >= -(eps**0.5) * largest:
        raise complaint(
            f"an operator with the Ritz value {float(values[0]):.3g} beside a largest of {largest:.3g}",
            "a symmetric positive semi-definite operator",
            _CAUSE,
        )
    return torch.where(values > eps * largest, values, 0.0), torch.from_numpy(vectors)
