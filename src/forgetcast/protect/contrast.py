r"""Contrast of features: those of one class together, all others apart. Both terms fall when that gets better.

    s_ij = <z_i, z_j> / (|z_i| |z_j|)            P(i) = {p != i: y_p = y_i}

A row of zeros has cosine 0 with every other. Source of both: NTK-CL, arXiv 2407.17120, and its released code.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from forgetcast.checks import complaint, require_finite, require_number


def pooled_infonce(
    z: Float[Tensor, "n D"], labels: Int[Tensor, " n"], temperature: float = 0.1
) -> tuple[Float[Tensor, ""], int]:
    r"""InfoNCE with one logarithm over all positive pairs of the batch, as in NTK-CL's released code.

        - log sum_i sum_{p in P(i)} exp(s_ip / temperature)  +  1/n sum_i log sum_{j != i} exp(s_ij / temperature)

    The released loss adds this times -0.2 (CIFAR-100: -0.03): the minus sign is the caller's, and with it descent
    drives the features of a class apart. Old prototypes are further rows of z there, under their own labels, so that
    they have no positives. A batch without a positive pair has an infinite value, which the released code replaces
    by 0: here the value is 0, without a gradient, and the number of pairs says so.

    Args:
        z: (n, D) features.
        labels: (n,) their classes.
        temperature: > 0.

    Returns:
        The value, and the number of ordered pairs (i, p) behind it.

    Raises:
        ValueError: features that are not finite or no matrix, another number of labels, a temperature out of range.

    Cost: n^2 D multiply-adds, n^2 numbers.
    """
    similarity, positive = _compared(z, labels, temperature)
    pairs = int(positive.sum())
    if not pairs:
        return (0 * z).sum(), 0
    return similarity.logsumexp(1).mean() - similarity[positive].logsumexp(0), pairs


def supervised_infonce(
    z: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    negatives: Float[Tensor, "m D"],
    temperature: float = 0.1,
) -> tuple[Float[Tensor, ""], int]:
    r"""InfoNCE with a logarithm for each positive pair, and further negatives that are nobody's positive.

        l_i = - 1/|P(i)| sum_{p in P(i)} log [ exp(s_ip / temperature)
                  / (sum_{j != i} exp(s_ij / temperature) + sum_k exp(cos(z_i, negative_k) / temperature)) ]
        value = mean of l_i over the anchors, the i with a non-empty P(i)

    Args:
        z: (n, D) features.
        labels: (n,) their classes.
        negatives: (m, D) features that no anchor belongs with, such as the prototypes of the old classes; of any
            floating type. m may be 0.
        temperature: > 0.

    Returns:
        The value, and the number of anchors behind it. Without an anchor both are 0, with a gradient of zeros.

    Raises:
        ValueError: features that are not finite or no matrix, another number of labels, negatives of another width, a
            temperature out of range.

    Cost: n (n + m) D multiply-adds, n (n + m) numbers.

    Source: Khosla et al., arXiv 2004.11362, eq. 2; old prototypes as negatives only: theory of NTK-CL, quirk B3.
    """
    similarity, positive = _compared(z, labels, temperature)
    if negatives.ndim != 2 or negatives.shape[1] != z.shape[1]:
        raise complaint(
            f"negatives of shape {tuple(negatives.shape)} beside features of shape {tuple(z.shape)}",
            f"(m, {z.shape[1]})",
            "Take prototypes of the same features; none are negatives[:0].",
        )
    require_finite("negatives", negatives)
    positives = positive.sum(1)
    anchors = positives > 0
    if not bool(anchors.any()):
        return (0 * z).sum(), 0
    against = normalize(z) @ normalize(negatives.to(z.dtype)).T / temperature
    total = torch.cat([similarity, against], 1).logsumexp(1)
    attraction = similarity.masked_fill(~positive, 0).sum(1) / positives
    return (total - attraction)[anchors].mean(), int(anchors.sum())


def _compared(z: Tensor, labels: Tensor, temperature: float) -> tuple[Float[Tensor, "n n"], Bool[Tensor, "n n"]]:
    """Cosines over the temperature, minus infinity between a row and itself; which pairs are positive."""
    if z.ndim != 2 or labels.shape != z.shape[:1]:
        raise complaint(
            f"features of shape {tuple(z.shape)} with labels of shape {tuple(labels.shape)}",
            "features (n, D) and labels (n,)",
            "Give one row of features and one class a sample.",
        )
    require_number("temperature", temperature, strict=True)
    require_finite("features", z)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    directions = normalize(z)
    similarity = (directions @ directions.T / temperature).masked_fill(own, -torch.inf)
    return similarity, (labels[:, None] == labels) & ~own
