"""Eigenvalues and directions of feature second moments; effective rank; overlap of two tangent spaces."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.tangent.features import Features
from forgetcast.tangent.linear_head import with_bias
from forgetcast.tangent.moments import streamed_gram


@dataclass(frozen=True, eq=False)
class Spectrum:
    r"""Eigen-decomposition `S = phi^T phi = V diag(s) V^T`, eigenvalues falling; outside the span of V, S is zero.

    The eigenvalues are those of the sample Gram `phi phi^T` as well. For a head of C outputs every one of them
    has multiplicity C in the tangent kernel `phi phi^T (x) I_C`, which is never formed.

    Attributes:
        values: s (k,) float64, falling, never negative.
        vectors: V (rows, k) float64, orthonormal columns; rows = d, or d + 1 with a bias.
        floor: eigenvalues below it are rounding noise of the type the products were taken in.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "rows k"]
    floor: float

    @property
    def complete(self) -> bool:
        """Whether V spans the whole space, so that nothing is left outside."""
        return self.vectors.shape[0] == self.vectors.shape[1]

    @property
    def effective_rank(self) -> float:
        """Participation ratio `(sum s)^2 / sum s^2`, between 1 and the rank; 0 for a zero matrix."""
        return participation_ratio(self.values)

    @property
    def rank(self) -> int:
        """Number of eigenvalues above the noise floor."""
        return int((self.values > self.floor).sum())


@dataclass(frozen=True, eq=False)
class Curvature:
    """A positive semi-definite matrix S, decomposed only when its directions are asked for.

    Attributes:
        matrix: S (rows, rows) float64; None in the dual form, where only its spectrum is known.
        product_type: the type in which the products behind S were taken.
        given: its spectrum, where that came first.
    """

    matrix: Float[Tensor, "rows rows"] | None
    product_type: torch.dtype
    given: Spectrum | None = None

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigenvalues and directions. Cost: about 9 rows^3, once."""
        if self.given is not None:
            return self.given
        assert self.matrix is not None
        return spectrum_of_gram(self.matrix, self.product_type)

    @property
    def decomposed(self) -> bool:
        """Whether the spectrum is there already."""
        return self.given is not None or "spectrum" in self.__dict__

    def dense(self) -> Float[Tensor, "rows rows"]:
        """S itself. Cost in the dual form: 2 rows^2 k."""
        if self.matrix is not None:
            return self.matrix
        vectors = self.spectrum.vectors
        return (vectors * self.spectrum.values) @ vectors.T

    def __matmul__(self, step: Float[Tensor, "rows c"]) -> Float[Tensor, "rows c"]:
        """`S step`."""
        if self.matrix is not None:
            return self.matrix @ step
        vectors = self.spectrum.vectors
        return vectors @ (self.spectrum.values[:, None] * (vectors.T @ step))

    def lies_between(self, least: float, most: float) -> bool:
        """Whether every eigenvalue of `matrix` lies between, by two Cholesky factorisations. Cost: 2/3 rows^3."""
        assert self.matrix is not None
        diagonal = self.matrix.diagonal()  # the extreme eigenvalues lie outside it
        if float(diagonal.min()) <= least or float(diagonal.max()) >= most:
            return False
        return is_positive(self.matrix, -least) and (most == float("inf") or is_positive(-self.matrix, most))


def is_positive(matrix: Float[Tensor, "rows rows"], shift: float) -> bool:
    """Whether `matrix + shift I` is positive definite. Cost: rows^3 / 3."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return int(torch.linalg.cholesky_ex(shifted).info) == 0


def participation_ratio(values: Float[Tensor, " k"]) -> float:
    """`(sum v)^2 / sum v^2` of non-negative values; 0 where all are zero."""
    square = float(values.square().sum())
    return float(values.sum()) ** 2 / square if square > 0 else 0.0


def spectrum_of_gram(gram: Float[Tensor, "rows rows"], product_type: torch.dtype) -> Spectrum:
    """Spectrum of a second-moment matrix (rows x rows), factored in float64. Cost: about 9 rows^3."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.flip(0).clamp_min(0)
    return Spectrum(values, vectors.flip(1), _noise_floor(values, product_type))


def spectrum_of_rows(phi: Float[Tensor, "n rows"]) -> Spectrum:
    r"""Spectrum from the samples themselves, for fewer samples than features (the dual form).

        phi^T = Q R,    R R^T = U diag(s) U^T,    V = Q U

    The n x n matrix `R R^T` has the eigenvalues of the sample Gram; going through Q keeps V orthonormal where
    dividing `phi^T u` by a small singular value would not. Cost: 4 d n^2 + 9 n^3, all float64.
    """
    basis, triangle = torch.linalg.qr(phi.double().T)
    inner = spectrum_of_gram(triangle @ triangle.T, torch.float64)
    return Spectrum(inner.values, basis @ inner.vectors, _noise_floor(inner.values, phi.dtype))


def spectrum_of(features: Features, stacked_rows: int) -> Spectrum:
    """Spectrum of `features`, primal (d x d) or dual (n x n), whichever is smaller.

    Args:
        features: the samples; streamed in blocks in the primal form.
        stacked_rows: d, or d + 1 to count the bias as a constant feature.
    """
    if features.rows is not None and features.rows < stacked_rows:
        phi, _ = features.gather()
        return spectrum_of_rows(with_bias(phi, stacked_rows))
    return spectrum_of_gram(streamed_gram(features, stacked_rows), product_type(features))


def product_type(features: Features) -> torch.dtype:
    """The type in which products of `features` are taken: float64 for float64 arrays, else float32."""
    return torch.float64 if features.is_array and features.phi.dtype == torch.float64 else torch.float32


def _noise_floor(values: Tensor, kind: torch.dtype) -> float:
    """Rounding of the products, and that of the factorisation in float64: n eps of the largest, as for matrix ranks."""
    if not len(values):
        return 0.0
    products = torch.finfo(kind if kind == torch.float64 else torch.float32).eps
    return float(values[0]) * max(products, len(values) * torch.finfo(torch.float64).eps)


@dataclass(frozen=True, eq=False)
class Overlap:
    r"""Overlap of the old and the new tangent-feature space, `O = V_old^T V_new`.

    Attributes:
        cosines: (min(rank_old, rank_new),) cosines of the principal angles, falling. With uncentred features the
            first is near 1 for any pair (the shared mean), so read the spectrum, not its first value.
        mean_square: `||O||_F^2 / min(rank_old, rank_new)`, in [0, 1].
        energy_weighted: `||K_on||_F^2 / (||K_oo||_F ||K_nn||_F)`, in [0, 1]: overlap weighted by feature energy.

    A screen, not a forecast: it knows neither the targets nor the training.
    Source: Doan et al., arXiv 2010.04003 (NTK overlap matrix).
    """

    cosines: Float[Tensor, " k"]
    mean_square: float
    energy_weighted: float


def overlap(old: Spectrum, new: Spectrum) -> Overlap:
    """NTK overlap of two spectra, each cut at its noise floor. Cost: rows rank_old rank_new + one small SVD."""
    old_rank, new_rank = max(old.rank, 1), max(new.rank, 1)
    matrix = old.vectors[:, :old_rank].T @ new.vectors[:, :new_rank]
    cosines = torch.linalg.svdvals(matrix).clamp(0, 1)
    cross = float((old.values[:old_rank, None] * matrix.square() * new.values[:new_rank]).sum())
    norms = float(old.values.norm() * new.values.norm())
    return Overlap(cosines, float(matrix.square().sum()) / len(cosines), cross / norms if norms > 0 else 0.0)


def kernel_overlap(
    old: Float[Tensor, "o o"], cross: Float[Tensor, "o n"], new: Float[Tensor, "n n"], noise: float | None = None
) -> Overlap:
    r"""NTK overlap from blocks of the tangent kernel, without a vector of the size of the parameters.

        O = Sigma_o^{-1} U_o^T K_on U_n Sigma_n^{-1},    K_oo = U_o Sigma_o^2 U_o^T,    K_nn = U_n Sigma_n^2 U_n^T

    Args:
        old: K_oo.
        cross: K_on.
        new: K_nn.
        noise: eigenvalues below this share of the largest are left out; the cosines are off by the rounding of the
            blocks over it. By default `sqrt(eps)` of their type.

    Cost: about 9 (o^3 + n^3). Source: Doan et al., arXiv 2010.04003.
    """
    share = torch.finfo(cross.dtype).eps ** 0.5 if noise is None else noise
    roots = [_inverse_root(block.double(), share) for block in (old, new)]
    matrix = roots[0].T @ cross.double() @ roots[1]
    if 0 in matrix.shape:
        return Overlap(torch.zeros(1, dtype=torch.float64), 0.0, 0.0)
    cosines = torch.linalg.svdvals(matrix).clamp(0, 1)
    weighted = float(cross.double().square().sum() / (old.double().norm() * new.double().norm()))
    return Overlap(cosines, float(matrix.square().sum()) / len(cosines), weighted)


def _inverse_root(block: Float[Tensor, "m m"], share: float) -> Float[Tensor, "m k"]:
    """`U Sigma^{-1}` of the eigenvalues above `share` of the largest."""
    values, vectors = torch.linalg.eigh(block)
    kept = values > share * values[-1].clamp_min(0)
    root: Tensor = vectors[:, kept] * values[kept].rsqrt()
    return root
