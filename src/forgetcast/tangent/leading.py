r"""The leading eigenvectors of a symmetric positive semi-definite operator: block Lanczos with thick restarts.

Why not `scipy.sparse.linalg.eigsh`: under a linear head of C outputs every eigenvalue of the tangent kernel has
multiplicity C, and a method that starts from one vector returns too few copies of it and calls that converged. Here a
block of b vectors finds b copies at once, and a random vector orthogonal to what was found looks for more.
"""

from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.tangent.krylov import Kernel

SEARCH = 0.01  # residual, relative to what is left, at which the search for a missed copy has seen enough


@dataclass(frozen=True, eq=False)
class LeadingModes:
    """The largest eigenvalues of an operator and their eigenvectors.

    Attributes:
        values: (k,) falling, float64, not negative.
        vectors: (k, *shape) orthonormal, float64.
        residuals: (k,) `||K u - value u||`; each value is that close to an eigenvalue.
        products: products with K, one for each vector of a block.
        converged: whether all residuals are at most tolerance times the largest value, and no copy was missed.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, " k *shape"]
    residuals: Float[Tensor, " k"]
    products: int
    converged: bool


def leading_modes(
    kernel: Kernel,
    shape: tuple[int, ...],
    k: int,
    *,
    block: int = 1,
    tolerance: float = 1e-5,
    most: int = 2000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LeadingModes:
    r"""The k largest eigenvalues of a symmetric positive semi-definite operator.

    Args:
        kernel: (b, *shape) -> K of each, (b, *shape).
        shape: of one vector.
        k: how many.
        block: vectors multiplied together; the number of outputs suits the tangent kernel of a linear head.
        tolerance: of the residuals, relative to the largest eigenvalue; eigenvalues are accurate to its square.
        most: products at most, roughly.
        seed: of the random starts.
        device: where vectors live.

    Raises:
        ValueError: k, block, tolerance or `most` out of range.

    Cost: 3 to 6 k products for falling eigenvalues, more for clustered ones, of which some 10 look for missed copies;
    memory 4 k + 8 block vectors.
    Source: thick restart, Wu & Simon, SIAM J. Matrix Anal. Appl. 22 (2000).
    """
    size = prod(shape)
    require_integer("k", k, least=1)
    require_integer("block", block, least=1)
    require_number("tolerance", tolerance, strict=True)
    require_integer("most", most, least=1)
    if k > size:
        raise complaint(f"got k={k}", f"at most {size}, the dimension of the operator", "Lower k.")
    generator = torch.Generator().manual_seed(seed)
    nothing = torch.zeros(0, size, dtype=torch.float64, device=device)

    def flat(u: Tensor) -> Tensor:
        return kernel(u.reshape(-1, *shape)).reshape(-1, size).to(u)

    found = _block_lanczos(flat, nothing, k, min(block, k), tolerance, 0.0, most, generator)
    while found.converged and k < size:
        if found.products >= most:
            found = replace(found, converged=False)
            break
        accuracy = tolerance * float(found.values[0])
        left = most - found.products
        beyond = _block_lanczos(flat, found.vectors, 1, 1, SEARCH, accuracy / SEARCH, left, generator)
        found = replace(found, products=found.products + beyond.products)
        if not float(beyond.values[0]) > float(found.values[-1]) + accuracy:
            break
        left = max(most - found.products, 1)
        found = _merged(
            found, _block_lanczos(flat, found.vectors, 1, 1, tolerance, accuracy / tolerance, left, generator)
        )
    return replace(found, vectors=found.vectors.reshape(-1, *shape))


def _block_lanczos(
    kernel: Kernel,
    locked: Float[Tensor, "l size"],
    k: int,
    block: int,
    tolerance: float,
    scale: float,
    most: int,
    generator: torch.Generator,
) -> LeadingModes:
    """The k largest, orthogonal to `locked`, to residuals of `tolerance * max(largest, scale)`."""
    size = locked.shape[1]
    room = min(2 * k + 4 * block, size - len(locked))
    basis, T = locked[:0], locked.new_zeros(0, 0)
    fresh = _orthonormal(locked[:0], locked, block, generator)
    products = 0
    while True:
        kept = len(basis)
        basis = torch.cat([basis, fresh])
        image = kernel(fresh)
        products += len(fresh)
        columns = basis @ image.T
        T = torch.cat([torch.cat([T, columns[:kept]], 1), columns.T], 0)
        around = torch.cat([locked, basis])
        for _ in range(2):
            image = image - (image @ around.T) @ around
        left, singular, fresh = torch.linalg.svd(image, full_matrices=False)
        values, vectors = torch.linalg.eigh((T + T.T) / 2)
        values, vectors = values.flip(0), vectors.flip(1)
        residuals = (singular[:, None] * (left.T @ vectors[kept:, :k])).norm(dim=0)
        largest = max(float(values[0]), scale)
        enough = len(values) >= k and float(residuals.max()) <= tolerance * largest
        converged = enough or len(around) == size
        if converged or products >= most:
            return LeadingModes(values[:k].clamp_min(0), vectors[:, :k].T @ basis, residuals, products, converged)
        if len(basis) + block > room:
            kept = min(k + block, len(basis))
            basis, T = vectors[:, :kept].T @ basis, torch.diag(values[:kept])
            around = torch.cat([locked, basis])
        noise = torch.finfo(torch.float64).eps * size**0.5 * largest
        fresh = _orthonormal(fresh[singular > noise], around, min(block, size - len(around)), generator)


def _orthonormal(
    given: Float[Tensor, "g size"], basis: Float[Tensor, "p size"], rows: int, generator: torch.Generator
) -> Float[Tensor, "rows size"]:
    """`rows` orthonormal rows orthogonal to `basis`: those given, and random ones where they are fewer."""
    random = torch.randn(max(rows - len(given), 0), basis.shape[1], generator=generator, dtype=torch.float64)
    result = torch.cat([given[:rows], random.to(basis)])
    for _ in range(2):
        result = torch.linalg.qr((result - (result @ basis.T) @ basis).T).Q.T
    return result


def _merged(found: LeadingModes, other: LeadingModes) -> LeadingModes:
    """The largest of both, as many as were found."""
    values = torch.cat([found.values, other.values])
    order = values.argsort(descending=True)[: len(found.values)]
    vectors, residuals = torch.cat([found.vectors, other.vectors]), torch.cat([found.residuals, other.residuals])
    products = found.products + other.products
    return LeadingModes(values[order], vectors[order], residuals[order], products, found.converged and other.converged)
