"""Contrast of features: against loops over pairs, by hand, and by what descent does to cosines."""

from math import e, exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from forgetcast.protect.contrast import pooled_infonce, supervised_infonce

DOUBLE = torch.float64
HAND = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]], dtype=DOUBLE)
SAME_TWICE = torch.tensor([4, 4, 7])


def drawn(seed, rows, width=5):
    return torch.randn(rows, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def classes(seed, rows, count=3):
    return torch.randint(count, (rows,), generator=torch.Generator().manual_seed(seed + 1))


def cosine(a, b):
    return cosine_similarity(a, b, dim=0).item()


def pooled_by_loops(z, y, temperature):
    n = len(z)
    pulled = [exp(cosine(z[i], z[j]) / temperature) for i in range(n) for j in range(n) if i != j and y[i] == y[j]]
    spread = [log(sum(exp(cosine(z[i], z[j]) / temperature) for j in range(n) if j != i)) for i in range(n)]
    return sum(spread) / n - log(sum(pulled)), len(pulled)


def supervised_by_loops(z, y, negatives, temperature):
    terms = []
    for i in range(len(z)):
        others = {j: exp(cosine(z[i], z[j]) / temperature) for j in range(len(z)) if j != i}
        total = sum(others.values()) + sum(exp(cosine(z[i], old) / temperature) for old in negatives)
        own = [log(value / total) for j, value in others.items() if y[j] == y[i]]
        if own:
            terms.append(-sum(own) / len(own))
    return sum(terms) / len(terms), len(terms)


def test_pooled_by_hand():
    """Cosines 1, 0, 0; two ordered pairs under one logarithm; each row against the two others, never itself."""
    value, pairs = pooled_infonce(HAND, SAME_TWICE, temperature=1.0)
    assert pairs == 2
    assert value.item() == pytest.approx((2 * log(e + 1) + log(2)) / 3 - log(2 * e), rel=1e-14)


def test_supervised_by_hand():
    """The third row has no positive and is no anchor; it and the old prototype are in the denominators."""
    value, anchors = supervised_infonce(HAND, SAME_TWICE, torch.tensor([[0.0, -3.0]]), temperature=1.0)
    assert anchors == 2
    assert value.item() == pytest.approx(log(e + 2) - 1, rel=1e-14)


@pytest.mark.parametrize("temperature", [0.1, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_loops_over_pairs(seed, temperature):
    z, y, negatives = drawn(seed, 9), classes(seed, 9), drawn(seed + 50, seed)
    value, pairs = pooled_infonce(z, y, temperature)
    assert (value.item(), pairs) == pytest.approx(pooled_by_loops(z, y, temperature), rel=1e-11)
    value, anchors = supervised_infonce(z, y, negatives, temperature)
    assert (value.item(), anchors) == pytest.approx(supervised_by_loops(z, y, negatives, temperature), rel=1e-11)


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_without_a_positive_pair_the_value_is_zero_and_counted(rows):
    z = drawn(0, rows).requires_grad_()
    for value, used in (
        pooled_infonce(z, torch.arange(rows)),
        supervised_infonce(z, torch.arange(rows), drawn(1, 2)),
    ):
        assert (value.item(), used) == (0, 0)
        (gradient,) = torch.autograd.grad(value, z)
        assert torch.equal(gradient, torch.zeros_like(z))


@settings(max_examples=40)
@given(st.integers(0, 1000), st.integers(2, 12))
def test_neither_the_order_of_a_batch_nor_the_length_of_a_row_matters(seed, rows):
    z, y, negatives = drawn(seed, rows), classes(seed, rows), drawn(seed + 2, 3)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    sizes = 10 ** (2 * torch.rand(rows, 1, generator=generator, dtype=DOUBLE) - 1)
    for term in (pooled_infonce, lambda z, y: supervised_infonce(z, y, negatives)):
        value, used = term(z, y)
        for other, theirs in ((z[order], y[order]), (sizes * z, y), (z, 5 - y)):
            again, count = term(other, theirs)
            assert count == used
            assert again.item() == pytest.approx(value.item(), rel=1e-10, abs=1e-12)


def test_gradients():
    z, y, negatives = drawn(3, 6).requires_grad_(), torch.tensor([0, 1, 0, 2, 0, 1]), drawn(4, 2)
    assert torch.autograd.gradcheck(lambda z: pooled_infonce(z, y, 0.3)[0], (z,))
    assert torch.autograd.gradcheck(lambda z: supervised_infonce(z, y, negatives, 0.3)[0], (z,))


def test_large_cosines_over_a_small_temperature_do_not_overflow():
    z = torch.ones(4, 3) + 1e-3 * torch.arange(12.0).view(4, 3)
    for value, _ in (
        pooled_infonce(z, torch.tensor([0, 0, 1, 1]), 1e-3),
        supervised_infonce(z, torch.tensor([0, 0, 1, 1]), z[:1], 1e-3),
    ):
        assert value.isfinite()


def mean_cosines(z, y, old):
    """Means over rows of the cosine within a class, between classes, and to the nearest of another class or old."""
    unit, old = (rows / rows.norm(dim=1, keepdim=True) for rows in (z, old))
    found, other = unit @ unit.T, y[:, None] != y
    same = ~other & ~torch.eye(len(z), dtype=torch.bool)
    nearest = torch.cat([found.masked_fill(~other, -1), unit @ old.T], 1).amax(1)
    return found[same].mean().item(), found[other].mean().item(), nearest.mean().item()


def descended(z, loss, steps=200, rate=0.1):
    z = z.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(z), z)
        with torch.no_grad():
            z -= rate * gradient
    return z.detach()


@pytest.mark.parametrize("seed", range(3))
def test_descent_gathers_classes_and_with_the_released_sign_scatters_them(seed):
    """16 unit features of 4 classes, 6 old prototypes; the mean cosine of 4 directions is at least -1/3.

    At -1/3 every class sums to nothing and the mean cosine between classes is 0 whatever it was: that rows of other
    classes attract each other shows in the nearest.
    """
    y, old = torch.arange(4).repeat(4), drawn(seed + 90, 6, 24)
    z = drawn(seed, 16, 24)
    z = z / z.norm(dim=1, keepdim=True)
    positive, negative, nearest = mean_cosines(z, y, old)

    gathered = mean_cosines(descended(z, lambda z: supervised_infonce(z, y, old)[0]), y, old)
    assert gathered[0] > positive + 0.3
    assert gathered[1] < negative - 0.05
    assert gathered[2] < nearest - 0.05

    both = torch.cat([y, 10 + torch.arange(len(old))])
    scattered = mean_cosines(descended(z, lambda z: -pooled_infonce(torch.cat([z, old]), both)[0]), y, old)
    assert -1 / 3 - 1e-9 <= scattered[0] < positive - 0.2
    assert scattered[2] > nearest + 0.2


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "term", [pooled_infonce, lambda z, y, *rest: supervised_infonce(z, y, torch.ones(2, z.shape[-1]), *rest)]
)
@pytest.mark.parametrize(
    ("z", "y", "temperature", "message"),
    [
        (torch.ones(3, 2), torch.zeros(2).long(), 0.1, r"\(3, 2\) with labels of shape \(2,\); expected.*one class"),
        (torch.ones(3), torch.zeros(3).long(), 0.1, r"features of shape \(3,\).*expected features \(n, D\)"),
        (torch.ones(3, 2), torch.zeros(3).long(), 0.0, r"temperature=0.0; expected a finite number above 0"),
        (torch.full((3, 2), torch.nan), torch.zeros(3).long(), 0.1, r"nan at \[0, 0\]"),
    ],
)
def test_bad_input_is_refused(term, z, y, temperature, message):
    with pytest.raises(ValueError, match=message):
        term(z, y, temperature)


@pytest.mark.usefixtures("unchecked_types")
def test_bad_negatives_are_refused():
    with pytest.raises(ValueError, match=r"negatives of shape \(2, 3\).*expected \(m, 2\).*negatives\[:0\]"):
        supervised_infonce(HAND, SAME_TWICE, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"negatives of shape \(1, 2\) holds inf"):
        supervised_infonce(HAND, SAME_TWICE, torch.full((1, 2), torch.inf))
