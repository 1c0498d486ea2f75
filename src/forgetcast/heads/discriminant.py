"""Gaussian classes: one covariance for all (linear discriminant), or one each (FeCAM's Mahalanobis distance)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from forgetcast.checks import complaint, require_number
from forgetcast.heads.base import StreamedHead


class Gaussian(StreamedHead):
    """Running class means and scatter matrices, exact whatever the order and the batches.

    Means and scatters are merged in centred form, so features far from the origin lose no digits.

    Attributes:
        means: (C, d) class means.
        scatter: (d, d) summed over classes if `shared`, else (C, d, d).

    Source: merging of means and scatters: Chan, Golub & LeVeque 1979.
    """

    means: Float[Tensor, "C d"]
    scatter: Float[Tensor, "*groups d d"]

    def __init__(self, width: int, outputs: int = 0, *, shared: bool) -> None:
        super().__init__(width, outputs)
        self.shared = shared
        self.by_output = ("counts", "means") if shared else ("counts", "means", "scatter")
        groups = () if shared else (outputs,)
        self.register_buffer("means", torch.zeros(outputs, width, dtype=torch.float64))
        self.register_buffer("scatter", torch.zeros(*groups, width, width, dtype=torch.float64))

    def absorb(self, phi: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Merge a batch: its scatter around its own means, and the step from the old means to those."""
        present, place, new = torch.unique(labels, return_inverse=True, return_counts=True)
        batch_means = phi.new_zeros(len(present), self.width).index_add_(0, place, phi) / new[:, None]
        old, new = self.counts[present].double(), new.double()  # quotients of integers would be float32
        step = batch_means - self.means[present]
        between = (old * new / (old + new)).sqrt()[:, None] * step
        rows, owners = torch.cat([phi - batch_means[place], between]), torch.cat([labels, present])
        if self.shared:
            self.scatter += rows.T @ rows
        else:
            for c in present.tolist():
                own = rows[owners == c]
                self.scatter[c] += own.T @ own
        self.means[present] += (new / (old + new))[:, None] * step


class LinearDiscriminant(Gaussian):
    r"""Streaming linear discriminant analysis.

        Sigma = (1 - s) S + s tr(S) / d I,    S = sum_i (phi_i - mu_{y_i})(phi_i - mu_{y_i})^T / n
        f_c(phi) = <Sigma^-1 mu_c, phi> - <mu_c, Sigma^-1 mu_c> / 2 + log p_c

    The paper shrinks toward I; here the target has the scale of S, as in scikit-learn, so that units do not matter.

    Cost: n d^2 to observe, d^3 / 3 + d^2 C to solve; memory d^2 + C d.

    Args:
        width: d.
        outputs: C at the start.
        shrinkage: s in [0, 1].
        priors: whether p_c is the share of the class in the samples; equal for all classes otherwise, as in the paper.

    Source: Hayes & Kanan, CVPR Workshops 2020 (arXiv 1909.01520), equations 1 to 4.
    """

    weight: Float[Tensor, "C d"]
    bias: Float[Tensor, " C"]

    def __init__(self, width: int, outputs: int = 0, *, shrinkage: float = 1e-4, priors: bool = False) -> None:
        super().__init__(width, outputs, shared=True)
        require_number("shrinkage", shrinkage, most=1)
        self.shrinkage = shrinkage
        self.priors = priors
        self.by_output = (*self.by_output, "weight", "bias")
        self.register_buffer("weight", torch.zeros(outputs, width, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(outputs, dtype=torch.float64))

    def fit(self) -> None:
        """Shrink the covariance and solve for weight and bias.

        Raises:
            ValueError: a singular covariance.
        """
        covariance = self.scatter / self.counts.sum()
        shrunk = (1 - self.shrinkage) * covariance
        shrunk.diagonal().add_(self.shrinkage * covariance.trace() / self.width)
        factor = cholesky("the covariance shared by all classes", shrunk)
        self.weight = torch.cholesky_solve(self.means.T, factor).T.contiguous()
        self.bias = -(self.weight * self.means).sum(1) / 2
        if self.priors:
            self.bias += (self.counts.double() / self.counts.sum()).log()

    def scores(self, phi: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """`phi W^T + b`."""
        return phi @ self.weight.T + self.bias


class Mahalanobis(Gaussian):
    r"""FeCAM: Mahalanobis distance under each class's own shrunk and normalised covariance.

        x = phi^power,    S_c = covariance of x in class c,    V_1, V_2 = mean of its diagonal, of the rest
        T_c = S_c + gamma_1 V_1 I + gamma_2 V_2 (1 1^T - I),    R_c = T_c scaled to a unit diagonal
        f_c(phi) = -(x / |x| - mu_c / |mu_c|)^T R_c^-1 (x / |x| - mu_c / |mu_c|)

    Two deviations from the reference implementation: mu_c is the mean of transformed features, not the transformed
    mean; a shared covariance is pooled within classes over all samples, not an average of one matrix a task.

    Cost: n d^2 to observe, C d^3 to solve, n C d^2 to classify; memory 2 C d^2.
    If shared, d^3 to solve, n d^2 + n C d to classify; memory 2 d^2.

    Args:
        width: d.
        outputs: C at the start.
        power: of Tukey's transform, 0.5 in the paper, for features that are never negative; 1 leaves them as they are.
        shrinkage: (gamma_1, gamma_2), gamma_1 >= gamma_2, which keeps T_c positive.
        shared: one covariance for all classes.

    Source: Goswami et al., NeurIPS 2023 (arXiv 2309.14062), section 3.
    """

    whitening: Float[Tensor, "*groups d d"]

    def __init__(
        self,
        width: int,
        outputs: int = 0,
        *,
        power: float = 1.0,
        shrinkage: tuple[float, float] = (1.0, 1.0),
        shared: bool = False,
    ) -> None:
        super().__init__(width, outputs, shared=shared)
        require_number("power", power, most=1, strict=True)
        require_number("shrinkage[0]", shrinkage[0], strict=True)
        require_number("shrinkage[1]", shrinkage[1], most=shrinkage[0])
        self.power = power
        self.shrinkage = shrinkage
        self.by_output = self.by_output if shared else (*self.by_output, "whitening")
        self.register_buffer("whitening", torch.zeros_like(self.scatter))

    def absorb(self, phi: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Merge a batch, transformed."""
        super().absorb(self.transform(phi), labels)

    def fit(self) -> None:
        """Whitening matrices `L^-1`, `R = L L^T`.

        Raises:
            ValueError: a class whose covariance is singular even when shrunk, such as one of a single sample.
        """
        if self.shared:
            self.whitening = self._whitening("the covariance shared by all classes", self.scatter)
            return
        for c in self.counts.nonzero()[:, 0].tolist():
            self.whitening[c] = self._whitening(
                f"the covariance of class {c} ({int(self.counts[c])} samples)", self.scatter[c]
            )

    def scores(self, phi: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """Minus squared distance, one class at a time: memory n d."""
        x, means = normalize(self.transform(phi)), normalize(self.means)
        if self.shared:
            x, means = x @ self.whitening.T, means @ self.whitening.T
        logits = x.new_empty(len(x), self.outputs)
        for c in range(self.outputs):
            gap = x - means[c]
            logits[:, c] = -(gap if self.shared else gap @ self.whitening[c].T).square().sum(1)
        return logits

    def transform(self, phi: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Tukey's transform `phi^power`.

        Raises:
            ValueError: a negative feature where power is not 1.
        """
        if self.power == 1:
            return phi
        if (phi < 0).any():
            raise complaint(
                f"features down to {float(phi.min()):g} with power={self.power}",
                "features that are never negative",
                "Give power=1, or a backbone that ends in a ReLU.",
            )
        return phi**self.power

    def _whitening(self, name: str, scatter: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
        # The scale n - 1 of a covariance cancels in the normalisation below.
        diagonal = torch.eye(self.width, dtype=scatter.dtype, device=scatter.device)
        variance = scatter.trace() / self.width
        rest = (scatter.sum() - scatter.trace()) / max(self.width * (self.width - 1), 1)
        shrunk = scatter + self.shrinkage[0] * variance * diagonal + self.shrinkage[1] * rest * (1 - diagonal)
        deviation = shrunk.diagonal().clamp_min(torch.finfo(scatter.dtype).tiny).sqrt()
        factor = cholesky(name, shrunk / deviation / deviation[:, None])
        whitening: Tensor = torch.linalg.solve_triangular(factor, diagonal, upper=False)
        return whitening.contiguous()


def cholesky(name: str, matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Lower Cholesky factor. Cost: d^3 / 3.

    Raises:
        ValueError: a matrix that is singular to rounding.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if failed or pivots.min() <= len(matrix) * torch.finfo(matrix.dtype).eps * pivots.max():
        raise complaint(
            f"{name} is singular in float64",
            "a positive definite matrix",
            "Raise the shrinkage, give more samples of each class, or share one covariance.",
        )
    return factor
