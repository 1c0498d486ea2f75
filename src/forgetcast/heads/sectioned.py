"""The nearest class mean of features from several sources side by side: each votes by its own cosine."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from forgetcast.checks import complaint, require_number
from forgetcast.heads.prototype import Prototype


class Sectioned(Prototype):
    r"""Class means of features that are S sections of width d = D / S side by side, a cosine for each section.

        f_c(phi) = scale sum_s m_s cos(phi_s, mu_{c,s}),        cos(0, .) = 0

    With one section of weight 1 it is the cosine `Prototype`. The weights are part of the state.

    Cost: n D to observe, n D C to classify, n C S numbers in between; memory C D.

    Args:
        width: D of all sections together.
        outputs: C at the start.
        weights: m (S,), none negative, not all zero.
        scale: sigma > 0.

    Attributes:
        weights: m (S,) float64.

    Source: NTK-CL, arXiv 2407.17120, released code: weights 0.3 (averaged) and 0.1 (current) of its two sections, or
    1.0 (frozen), 0.3, 0.1 of three; sigma 1.
    """

    weights: Float[Tensor, " S"]

    def __init__(self, width: int, outputs: int = 0, *, weights: Sequence[float], scale: float = 1.0) -> None:
        super().__init__(width, outputs)
        require_number("scale", scale, strict=True)
        if not weights or width % len(weights):
            raise complaint(
                f"{len(weights)} weights for features of width {width}",
                "one for each of some sections of equal width",
                "Give as many weights as there are feature vectors side by side.",
            )
        self.scale = scale
        self.register_buffer("weights", torch.zeros(len(weights), dtype=torch.float64))
        self.weigh(weights)

    def weigh(self, weights: Sequence[float]) -> None:
        """Take other weights.

        Raises:
            ValueError: another number of them, negative ones, none above zero.
        """
        given = [float(weight) for weight in weights]
        for place, weight in enumerate(given):
            require_number(f"weights[{place}]", weight)
        if len(given) != len(self.weights) or not any(given):
            raise complaint(
                f"weights {given} for {len(self.weights)} sections",
                "one for each section, not all zero",
                "Correct the weights.",
            )
        self.weights.copy_(torch.tensor(given, dtype=torch.float64))

    def scores(self, phi: Float[Tensor, "n D"]) -> Float[Tensor, "n C"]:
        """Weighted sum of the sections' cosines."""
        return self.scale * (self.cosines(phi) @ self.weights)

    def cosines(self, phi: Float[Tensor, "n D"]) -> Float[Tensor, "n C S"]:
        """`cos(phi_s, mu_{c,s})` of every sample, class and section, float64; 0 for a class without a sample."""
        return torch.einsum("nsd,csd->ncs", self._unit(phi.double()), self._unit(self.sums))

    def cosines_without_own(self, phi: Float[Tensor, "n D"], labels: Int[Tensor, " n"]) -> Float[Tensor, "n C S"]:
        r"""Cosines of samples that the head has observed, each with the mean of its own class taken without it.

            mu_c without i = (n_c mu_c - phi_i) / (n_c - 1),    of which the direction of n_c mu_c - phi_i is enough

        0 where a sample is the only one of its class. Cost: n D C, and n C S numbers.
        """
        phi = phi.double()
        rest = (self.sums[labels] - phi) * (self.counts[labels] > 1)[:, None]
        own = (self._unit(phi) * self._unit(rest)).sum(2)
        return self.cosines(phi).index_put((torch.arange(len(labels), device=phi.device), labels), own)

    def _unit(self, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n S d"]:
        return normalize(rows.reshape(len(rows), len(self.weights), self.width // len(self.weights)), dim=2)


def fit_weights(
    head: Sectioned,
    phi: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    *,
    observed: bool = True,
    prior: float = 30.0,
) -> Float[Tensor, " S"]:
    r"""Section weights by cross-entropy on training samples, none of which is part of the mean it is compared with.

        min_{m >= 0}  sum_i CE(sum_s m_s cos_is, y_i) + sum_s m_s^2 / (2 prior^2)

    strictly convex; the size of m is the sharpness of the softmax that suits these samples, and only the shares count
    for the head. The prior keeps m finite where samples are told apart without error. Every class of which the head has
    a mean is a rival, old ones without samples included.

    A network trained on these very samples knows them better than samples to come. A part of the training samples that
    it was not trained on shows that: `observed=False` where the head has not seen them either.

    Args:
        head: it keeps its weights; give it the result by `head.weigh(weights.tolist())`.
        phi: (n, D) features.
        labels: (n,) their outputs.
        observed: whether these are among the samples that the head has observed: then each is left out of the mean of
            its own class, and samples that are alone in their class are not used.
        prior: standard deviation of each m_s. Measured on CIFAR-100 in DeiT features: m sums to 25 .. 45, and priors
            from 10 to 100 give the same accuracy within 0.5 points.

    Returns:
        m (S,) float64, divided by its sum; equal weights where no section tells the classes apart.

    Raises:
        ValueError: features of another width or not finite, labels that are no output, more samples of a class than the
            head has observed, fewer than two classes in the head, no sample that can be used.

    Cost: n D C multiply-adds once, n C S numbers; then some 15 times n C S.
    """
    require_number("prior", prior, strict=True)
    head._check(phi, labels)
    labels = labels.to(phi.device)
    given, known = torch.bincount(labels, minlength=head.outputs), head.counts > 0
    if observed and bool((given > head.counts).any()):
        worst = int((given - head.counts).argmax())
        raise complaint(
            f"{int(given[worst])} samples of output {worst}, of which the head has observed {int(head.counts[worst])}",
            "samples that the head has observed",
            "Call observe with them first, or give observed=False.",
        )
    used = head.counts[labels] > int(observed)
    if int(known.sum()) < 2 or not bool(used.any()):
        raise complaint(
            f"{int(used.sum())} samples that can be used, {int(known.sum())} classes in the head",
            "two classes, and a sample whose class has a mean without it",
            "Leave the head the weights it has.",
        )
    phi, labels = phi[used], labels[used]
    cosines = (head.cosines_without_own(phi, labels) if observed else head.cosines(phi))[:, known]
    weights = _most_likely(cosines, (known.cumsum(0) - 1)[labels], prior)
    total = weights.sum()
    return weights / total if total > 0 else torch.full_like(weights, 1 / len(weights))


def _most_likely(cosines: Float[Tensor, "n C S"], target: Int[Tensor, " n"], prior: float) -> Float[Tensor, " S"]:
    """The minimum of `fit_weights`; solved in m / prior and per sample, where all numbers are near 1."""

    def loss(values: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        with torch.enable_grad():
            m = torch.tensor(values, device=cosines.device, requires_grad=True)
            value = cross_entropy(cosines @ m * prior, target) + m.square().sum() / (2 * len(target))
            (gradient,) = torch.autograd.grad(value, m)
        return value.item(), gradient.cpu().numpy()

    sections = cosines.shape[2]
    found = minimize(
        loss,
        np.ones(sections),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * sections,
        options={"ftol": 1e-13, "gtol": 1e-9},
    )
    return torch.tensor(found.x, device=cosines.device)
