"""Prototypes and Gaussian classes against joint formulas in numpy and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances

from builders import features, labels
from forgetcast.heads.discriminant import LinearDiscriminant, Mahalanobis
from forgetcast.heads.prototype import Prototype

WIDTH, OUTPUTS, ROWS = 8, 4, 160


def classes(offset=0.0, decay=0.5):
    """Classes apart from each other, unequal in size; test features beside them."""
    y = labels(ROWS, 0, OUTPUTS) * (torch.arange(ROWS) % 3 > 0)
    centres = features(OUTPUTS, WIDTH, decay=0.0, seed=4)
    phi = features(ROWS, WIDTH, decay=decay) + centres[y] + offset
    return phi, y, features(30, WIDTH, decay=decay, seed=9) + offset


def streamed(head, phi, y, size=11, order=None):
    for rows in (torch.arange(len(y)) if order is None else order).split(size):
        head.observe(phi[rows], y[rows])
    head.solve()
    return head


def class_means(phi, y):
    return np.stack([phi[y == c].mean(0).numpy() for c in range(OUTPUTS)])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_streamed_means_are_joint_means(metric):
    phi, y, test = classes()
    head = streamed(Prototype(WIDTH, OUTPUTS, metric=metric), phi, y)
    means = class_means(phi, y)
    np.testing.assert_allclose(head.means, means, rtol=1e-12, atol=1e-13)
    expected = cosine_similarity(test, means) if metric == "cosine" else -(euclidean_distances(test, means) ** 2)
    np.testing.assert_allclose(head(test), expected, atol=1e-10)


def test_moved_means_are_those_of_moved_samples():
    phi, y, test = classes()
    head = streamed(Prototype(WIDTH, OUTPUTS), phi, y)
    which, moves = torch.tensor([True, False, True, False]), features(2, WIDTH, decay=0.0, seed=7)
    head.move(which, moves)
    by_class = torch.zeros(OUTPUTS, WIDTH, dtype=phi.dtype).index_put((which.nonzero()[:, 0],), moves.to(phi))
    again = streamed(Prototype(WIDTH, OUTPUTS), phi + by_class[y], y)
    np.testing.assert_allclose(head.means, again.means, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(head(test), again(test), rtol=1e-10)
    for wrong, message in ((moves[:1], "moves of shape"), (moves[:, 1:], "a row a class"), (moves / 0, "moves")):
        with pytest.raises(ValueError, match=message):
            head.move(which, wrong)
    np.testing.assert_allclose(head.means, again.means, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_streaming_discriminant_is_scikit_learns(shrinkage, offset):
    phi, y, test = classes(offset)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(phi.numpy(), y.numpy())
    expected = oracle.decision_function(test.numpy())
    expected -= expected[:, :1]
    for size, order in ((1, None), (17, y.argsort()), (ROWS, None)):
        logits = streamed(LinearDiscriminant(WIDTH, OUTPUTS, shrinkage=shrinkage, priors=True), phi, y, size, order)(
            test
        )
        logits = logits - logits[:, :1]
        np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-10 * max(1.0, offset**2))


def test_discriminant_without_priors_differs_by_their_logarithm():
    phi, y, test = classes()
    with_priors = streamed(LinearDiscriminant(WIDTH, OUTPUTS, priors=True), phi, y)(test)
    without = streamed(LinearDiscriminant(WIDTH, OUTPUTS), phi, y)(test)
    expected = (torch.bincount(y).double() / ROWS).log().expand_as(without)
    assert torch.allclose(with_priors - without, expected, atol=1e-10)


def fecam_distances(phi, y, test, power, gammas, shared):
    phi, test = phi.numpy() ** power, test.numpy() ** power
    y = y.numpy()
    pooled = sum(np.cov(phi[y == c].T) * ((y == c).sum() - 1) for c in range(OUTPUTS)) / (len(y) - OUTPUTS)
    distances = np.zeros((len(test), OUTPUTS))
    for c in range(OUTPUTS):
        covariance = pooled if shared else np.cov(phi[y == c].T)
        off = ~np.eye(WIDTH, dtype=bool)
        shrunk = covariance + gammas[0] * np.diag(covariance).mean() * ~off + gammas[1] * covariance[off].mean() * off
        deviation = np.sqrt(np.diag(shrunk))
        inverse = np.linalg.inv(shrunk / np.outer(deviation, deviation))
        mean = phi[y == c].mean(0)
        for i, x in enumerate(test):
            gap = x / np.linalg.norm(x) - mean / np.linalg.norm(mean)
            distances[i, c] = gap @ inverse @ gap
    return distances


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("power", "gammas"), [(1.0, (1.0, 1.0)), (0.5, (1.0, 0.0)), (0.5, (10.0, 10.0))])
def test_fecam_is_the_dense_formula(shared, power, gammas):
    phi, y, test = classes()
    if power != 1:
        phi, test = phi.abs(), test.abs()
    expected = -fecam_distances(phi, y, test, power, gammas, shared)
    for size, order in ((1, None), (17, y.argsort()), (ROWS, None)):
        head = Mahalanobis(WIDTH, OUTPUTS, power=power, shrinkage=gammas, shared=shared)
        np.testing.assert_allclose(streamed(head, phi, y, size, order)(test), expected, rtol=1e-9)


def test_fecam_refuses_what_it_cannot_transform_or_invert():
    phi, y, _ = classes()
    head = Mahalanobis(WIDTH, OUTPUTS, power=0.5)
    with pytest.raises(ValueError, match=r"power=0.5; expected features that are never negative"):
        head.observe(phi, y)
    head = Mahalanobis(WIDTH, OUTPUTS)
    head.observe(phi[:1], y[:1])
    with pytest.raises(ValueError, match=r"class 0 \(1 samples\) is singular.*share one covariance"):
        head.solve()


def test_discriminant_refuses_a_singular_covariance():
    phi, y, _ = classes()
    head = LinearDiscriminant(WIDTH, OUTPUTS, shrinkage=0.0)
    head.observe(phi[:5], y[:5])
    with pytest.raises(ValueError, match=r"shared by all classes is singular.*Raise the shrinkage"):
        head.solve()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Prototype(WIDTH, metric="cosin"), "Did you mean 'cosine'"),
        (lambda: LinearDiscriminant(WIDTH, shrinkage=1.5), "shrinkage=1.5"),
        (lambda: Mahalanobis(WIDTH, power=0.0), "power=0.0"),
        (lambda: Mahalanobis(WIDTH, shrinkage=(1.0, 2.0)), r"shrinkage\[1\]=2.0"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
