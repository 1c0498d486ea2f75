"""Sections that vote by their own cosine, and weights that a sample does not choose by meeting itself."""

import pytest
import torch
from scipy.optimize import minimize
from sklearn.metrics.pairwise import cosine_similarity
from torch.nn.functional import cross_entropy

from builders import features, labels
from forgetcast.heads.base import UNSEEN
from forgetcast.heads.prototype import Prototype
from forgetcast.heads.sectioned import Sectioned, fit_weights

DOUBLE = torch.float64


def observed(phi, y, weights, outputs=None, **options):
    head = Sectioned(phi.shape[1], int(y.max()) + 1 if outputs is None else outputs, weights=weights, **options)
    for rows in torch.arange(len(y)).split(7):
        head.observe(phi[rows], y[rows])
    head.solve()
    return head


def noise(rows, width, seed):
    return torch.randn(rows, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def classes_in_noise(count, size, width, seed, spread=1.0):
    """`size` samples around each of `count` random means, class after class, and as many again to test on."""
    means, y = noise(count, width, seed), torch.arange(count).repeat_interleave(size)
    return means[y] + spread * noise(len(y), width, seed + 1), means[y] + spread * noise(len(y), width, seed + 2), y


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((0.3, 0.1), [0.3 * 0.6 + 0.1, 0.3 * 0.8]), ((1.0, 0.0), [0.6, 0.8]), ((0.0, 2.0), [2.0, 0.0])],
)
def test_logits_by_hand(weights, expected):
    """The sample (3, 4 | 0, 5) before the means (2, 0 | 0, 1) and (0, 7 | 1, 0): each section by its own length."""
    phi = torch.tensor([[1.0, 0, 0, 2], [3, 0, 0, 0], [0, 7, 1, 0]], dtype=DOUBLE)
    head = observed(phi, torch.tensor([0, 0, 1]), weights)
    logits = head(torch.tensor([[3.0, 4, 0, 5]], dtype=DOUBLE))
    assert logits.tolist()[0] == pytest.approx(expected, rel=1e-14)
    assert torch.allclose(
        observed(phi, torch.tensor([0, 0, 1]), weights, scale=4.0)(phi),
        4 * observed(phi, torch.tensor([0, 0, 1]), weights)(phi),
    )


def test_three_sections_are_the_weighted_sum_of_scikit_learns_cosines():
    phi, y, test = features(60, 12, decay=0.3), labels(60, 0, 4), features(9, 12, seed=5)
    means = torch.stack([phi[y == c].mean(0) for c in range(4)])
    weights = (1.0, 0.3, 0.1)
    expected = sum(
        weight * torch.from_numpy(cosine_similarity(test[:, part], means[:, part]))
        for weight, part in zip(weights, (slice(0, 4), slice(4, 8), slice(8, 12)), strict=True)
    )
    head = observed(phi, y, weights)
    assert torch.allclose(head(test), expected, atol=1e-13)
    longer = torch.tensor([1.0, 50.0, 0.02], dtype=DOUBLE).repeat_interleave(4)
    assert torch.allclose(observed(phi * longer, y, weights)(test * longer), expected, atol=1e-13)


def test_one_section_is_the_prototype_and_a_silent_section_adds_nothing():
    phi, y, test = features(40, 6, decay=0.3), labels(40, 0, 3), features(9, 6, seed=5)
    plain = Prototype(6, 3)
    plain.observe(phi, y)
    plain.solve()
    assert torch.allclose(observed(phi, y, (1.0,))(test), plain(test), atol=1e-14)
    padded, beside = (torch.cat([rows, torch.zeros_like(rows)], 1) for rows in (phi, test))
    assert torch.allclose(observed(padded, y, (1.0, 5.0))(beside), plain(test), atol=1e-14)


def test_weights_are_part_of_the_state():
    phi, y = features(40, 6, decay=0.3), labels(40, 0, 3)
    head, twin = observed(phi, y, (0.3, 0.1)), Sectioned(6, weights=(1.0, 1.0))
    head.weigh((0.5, 0.25))
    twin.load_state_dict(head.state_dict())
    assert twin.weights.tolist() == [0.5, 0.25]
    assert torch.equal(twin(phi), head(phi))
    with pytest.raises(RuntimeError, match="size mismatch for weights"):
        Sectioned(6, weights=(1.0, 1.0, 1.0)).load_state_dict(head.state_dict())


def test_cosines_without_own_are_those_of_a_head_that_never_saw_the_sample():
    phi, y = features(30, 8, decay=0.3), labels(30, 0, 4)
    y[7] = 4  # alone in its class
    head = observed(phi, y, (1.0, 1.0))
    found = head.cosines_without_own(phi, y)
    for i in range(30):
        others = torch.arange(30) != i
        again = observed(phi[others], y[others], (1.0, 1.0), outputs=5)
        assert torch.allclose(found[i], again.cosines(phi[i : i + 1])[0], atol=1e-13)
    assert not found[7, 4].any()


@pytest.mark.parametrize("seed", range(5))
def test_fitted_weights_find_the_section_that_informs(seed):
    phi, test, y = classes_in_noise(6, 8, 30, 10 * seed, spread=2.0)
    seen, unseen = (
        torch.cat([noise(len(y), 30, start + seed), rows, noise(len(y), 30, start + 50 + seed)], 1)
        for start, rows in ((100, phi), (200, test))
    )
    head = observed(seen, y, (1.0, 1.0, 1.0))

    def accuracy():
        return (head(unseen).argmax(1) == y).double().mean()

    equal = accuracy()
    weights = fit_weights(head, seen, y)
    assert weights.sum() == pytest.approx(1)
    assert weights[1] > 0.8
    assert head.weights.tolist() == [1.0, 1.0, 1.0]
    head.weigh(weights.tolist())
    assert accuracy() > equal + 0.1
    # Each of eight samples is part of its own mean: noise seems to inform as well unless the sample is taken out.
    assert fit_weights(head, seen, y, observed=False)[1] < weights[1] - 0.2
    assert fit_weights(head, unseen, y, observed=False)[1] > 0.8


@pytest.mark.parametrize("prior", [0.5, 30.0])
def test_fitted_weights_are_the_optimum_of_the_convex_problem(prior):
    """Against SLSQP with numerical gradients, where the prior matters and where it does not."""
    parts = [classes_in_noise(5, 30, 6, 3 * s, spread)[0] for s, spread in enumerate((1.5, 2.0, 30.0))]
    phi, y = torch.cat(parts, 1), torch.arange(5).repeat_interleave(30)
    head = observed(phi, y, (1.0, 1.0, 1.0))
    cosines = head.cosines_without_own(phi, y)

    def loss(m):
        m = torch.as_tensor(m, dtype=DOUBLE)
        fit = cross_entropy(cosines @ m, y, reduction="sum") + m.square().sum() / (2 * prior**2)
        return fit.item() / len(y)

    best = minimize(loss, [1.0] * 3, bounds=[(0, None)] * 3, method="SLSQP", options={"ftol": 1e-13})
    assert best.success
    assert fit_weights(head, phi, y, prior=prior).tolist() == pytest.approx(best.x / sum(best.x), abs=1e-3)


def test_equal_weights_where_no_section_informs():
    """Two classes of opposite samples: without a sample its class lies on the other side, in every section."""
    phi = torch.tensor([[1.0, 0, 1, 0], [-1, 0, -1, 0], [0, 1, 0, 1], [0, -1, 0, -1]], dtype=DOUBLE)
    y = torch.tensor([0, 0, 1, 1])
    assert fit_weights(observed(phi, y, (1.0, 0.0)), phi, y).tolist() == [0.5, 0.5]


def test_the_order_of_sections_and_samples_does_not_matter():
    parts = [classes_in_noise(5, 12, 6, 3 * s, spread)[0] for s, spread in enumerate((1.5, 2.0, 3.0))]
    y, order = torch.arange(5).repeat_interleave(12), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    fitted = []
    for turn in ([0, 1, 2], [2, 0, 1]):
        phi = torch.cat([parts[s] for s in turn], 1)
        head = observed(phi, y, (1.0, 1.0, 1.0))
        weights = fit_weights(head, phi, y)
        head.grow(9)  # outputs without a sample are no rivals
        assert torch.allclose(fit_weights(head, phi[order], y[order]), weights, atol=1e-4)
        fitted.append(weights)
    assert torch.allclose(fitted[0][[2, 0, 1]], fitted[1], atol=1e-3)
    assert fitted[0].min() > 0.02  # all three inform


@pytest.mark.parametrize("seed", range(3))
def test_classes_known_by_their_means_alone_are_rivals(seed):
    """The first section tells classes 1 and 2 apart best, but class 1 lies where the old class 0 does."""
    y, axes = torch.arange(2).repeat_interleave(60), torch.eye(6, dtype=DOUBLE)
    first, second = axes[[0, 1]][y] + 0.2 * noise(120, 6, seed), axes[[2, 3]][y] + 0.25 * noise(120, 6, 50 + seed)
    new, old = torch.cat([first, second], 1), torch.cat([axes[0], axes[4]])[None]
    alone = fit_weights(observed(new, y, (1.0, 1.0)), new, y)
    head = observed(torch.cat([old, new]), torch.cat([torch.tensor([0]), y + 1]), (1.0, 1.0))
    assert fit_weights(head, new, y + 1)[1] > alone[1] + 0.1


def test_an_output_without_a_sample_stays_unseen():
    head = observed(features(10, 6), labels(10, 0, 2), (1.0, 1.0), outputs=4)
    assert (head(features(3, 6))[:, 2:] == UNSEEN).all()


@pytest.mark.parametrize(
    ("width", "options", "message"),
    [
        (7, {"weights": (1.0, 1.0)}, r"2 weights for features of width 7.*sections of equal width"),
        (6, {"weights": ()}, r"0 weights for features of width 6"),
        (6, {"weights": (1.0, -0.1)}, r"weights\[1\]=-0.1; expected a finite number of at least 0"),
        (6, {"weights": (1.0, float("nan"))}, r"weights\[1\]=nan"),
        (6, {"weights": (0.0, 0.0)}, r"weights \[0.0, 0.0\] for 2 sections.*not all zero"),
        (6, {"weights": (1.0,), "scale": 0.0}, r"scale=0.0"),
    ],
)
def test_bad_arguments(width, options, message):
    with pytest.raises(ValueError, match=message):
        Sectioned(width, **options)


def test_weights_that_cannot_be_fitted_are_refused():
    phi, y = features(12, 6), torch.arange(4).repeat(3)
    head = observed(phi, y, (1.0, 1.0))
    with pytest.raises(ValueError, match=r"weights \[1.0\] for 2 sections"):
        head.weigh([1.0])
    with pytest.raises(ValueError, match=r"6 samples of output 0, of which the head has observed 3.*observed=False"):
        fit_weights(head, phi.repeat(2, 1), y.repeat(2))
    with pytest.raises(ValueError, match=r"width 6; expected \(n, 6\)"):
        fit_weights(head, phi[:, :4], y)
    with pytest.raises(ValueError, match=r"holds inf"):
        fit_weights(head, torch.full_like(phi, torch.inf), y)
    with pytest.raises(ValueError, match=r"labels from 9 to 9"):
        fit_weights(head, phi, torch.full((12,), 9))
    with pytest.raises(ValueError, match=r"prior=0.0"):
        fit_weights(head, phi, y, prior=0.0)
    single = observed(phi[:4], y[:4], (1.0, 1.0))
    with pytest.raises(ValueError, match=r"0 samples that can be used, 4 classes.*Leave the head"):
        fit_weights(single, phi[:4], y[:4])
    with pytest.raises(ValueError, match=r"3 samples that can be used, 1 classes"):
        fit_weights(observed(phi[y == 0], y[y == 0], (1.0, 1.0)), phi[y == 0], y[y == 0])
