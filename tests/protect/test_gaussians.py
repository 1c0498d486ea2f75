"""Classes as Gaussians: what they are, where they move, what is drawn of them, and the head that learns from it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import assert_plain
from torch import Tensor
from torch.nn.functional import cross_entropy

from forgetcast.heads.cosine import Cosine
from forgetcast.heads.linear import Linear
from forgetcast.protect.gaussians import Alignment, Gaussians, section_shifts, shifts

DOUBLE = torch.float64
seeds = st.integers(0, 10**6)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def by_loops(means: Tensor, before: Tensor, after: Tensor, bandwidth: float, floor: float) -> Tensor:
    found = torch.zeros_like(means)
    for c, mean in enumerate(means):
        total = 0.0
        for old, new in zip(before, after, strict=True):
            distance = sum((float(a) - float(b)) ** 2 for a, b in zip(old, mean, strict=True))
            weight = math.exp(-distance / (2 * bandwidth**2)) + floor
            found[c] += weight * (new - old)
            total += weight
        found[c] /= total
    return found


@given(seeds, st.floats(0.3, 30.0), st.sampled_from([0.0, 1e-5, 0.1]))
def test_shifts_are_the_equation(seed, bandwidth, floor):
    means, before, after = drawn(seed, 3, 4), drawn(seed + 1, 6, 4), drawn(seed + 2, 6, 4)
    found = shifts(means, before, after, bandwidth, floor)
    torch.testing.assert_close(found, by_loops(means, before, after, bandwidth, floor), atol=1e-10, rtol=1e-8)


@given(seeds, st.floats(1e-3, 100.0), st.sampled_from([0.0, 1e-5]), st.floats(0.0, 1e4))
def test_a_translation_of_all_features_is_found_exactly(seed, bandwidth, floor, far):
    means, before, along = drawn(seed, 3, 4) + far, drawn(seed + 1, 6, 4), drawn(seed + 2, 4)
    found = shifts(means, before, before + along, bandwidth, floor)
    torch.testing.assert_close(found, along.expand(3, 4), atol=1e-12, rtol=1e-12)
    assert not shifts(means, before, before, bandwidth, floor).any()


@given(seeds, st.sampled_from([1, 2, 3]), st.floats(0.3, 3.0), st.floats(1e-3, 1e3))
def test_sections_move_each_by_itself_in_their_own_units(seed, sections, bandwidth, unit):
    means, before, after = drawn(seed, 3, 6), drawn(seed + 1, 5, 6), drawn(seed + 2, 5, 6)
    found = section_shifts(means, before, after, sections, bandwidth)
    parts = [tuple(given.chunk(sections, 1)[k] for given in (means, before, after)) for k in range(sections)]
    widths = [float(torch.stack([(a - b).norm() for a in mean for b in was]).median()) for mean, was, _ in parts]
    expected = [shifts(*part, bandwidth * width) for part, width in zip(parts, widths, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected, 1))
    scale = torch.ones(6, dtype=DOUBLE)
    scale[: 6 // sections] = unit
    scaled = section_shifts(*(given * scale for given in (means, before, after)), sections, bandwidth)
    torch.testing.assert_close(scaled, found * scale)


def test_means_without_any_distance_from_the_samples_move_as_these_do():
    at, along = torch.ones(3, 4, dtype=DOUBLE), drawn(0, 4)
    torch.testing.assert_close(section_shifts(at, at, at + along, 2), along.expand(3, 4))
    assert section_shifts(at[:0], at, at + along, 2).shape == (0, 4)


def test_far_from_all_samples_a_mean_moves_as_the_nearest_or_with_a_floor_as_all():
    before, after = drawn(0, 5, 3), drawn(1, 5, 3)
    mean = before[2:3] * 1e4
    nearest = int(torch.cdist(mean, before).argmin())
    moves = after - before
    torch.testing.assert_close(shifts(mean, before, after, 1e-2)[0], moves[nearest])
    torch.testing.assert_close(shifts(mean, before, after, 1e-2, 1e-5)[0], moves.mean(0))


def test_means_follow_a_smooth_drift():
    """Samples of other classes all around: the nearer those that count, the nearer to where the old samples are now."""

    def drift(phi: Tensor) -> Tensor:
        return phi + 0.4 * torch.sin(phi) + 0.3 * phi.roll(1, 1)

    old = [0.3 * drawn(c, 400, 2) + drawn(100 + c, 2) for c in range(4)]
    new = 1.5 * drawn(7, 4000, 2)
    true = torch.stack([drift(phi).mean(0) for phi in old])
    far = {}
    for bandwidth in (100.0, 1.0, 0.3):
        classes = Gaussians()
        for c, phi in enumerate(old):
            classes.measure(phi, torch.full((400,), c))
        start = torch.stack([values["mean"] for values in classes.classes.values()])
        roots = [values["root"] for values in classes.classes.values()]
        classes.shift(new, drift(new), bandwidth)
        found = torch.stack([values["mean"] for values in classes.classes.values()])
        far[bandwidth] = float((found - true).norm() / (start - true).norm())
        assert all(
            torch.equal(values["root"], root) for values, root in zip(classes.classes.values(), roots, strict=True)
        )
    assert far[0.3] < far[1.0] < far[100.0]
    assert far[0.3] < 0.1
    assert far[1.0] < 0.6


@given(seeds, st.integers(1, 12))
def test_measured_classes_have_mean_and_covariance_of_their_samples(seed, count):
    phi, labels = drawn(seed, 2 * count, 4), torch.arange(2 * count) % 2 + 3
    classes = Gaussians(jitter=0.01)
    classes.measure(phi.float(), labels)
    assert list(classes.classes) == [3, 4]
    for c, values in classes.classes.items():
        own = phi[labels == c].float().double()
        covariance = own.T.cov() if count > 1 else torch.zeros(4, 4, dtype=DOUBLE)
        torch.testing.assert_close(values["mean"], own.mean(0))
        torch.testing.assert_close(values["root"] @ values["root"].T, covariance + 0.01 * torch.eye(4, dtype=DOUBLE))
    classes.measure(phi[:2] + 5, torch.tensor([3, 3]))
    torch.testing.assert_close(classes.classes[3]["mean"], phi[:2].mean(0) + 5)


def test_what_is_drawn_has_the_moments_of_its_class():
    classes = Gaussians(seed=1)
    phi, labels = drawn(3, 40, 3), torch.arange(40) % 2
    classes.measure(phi, labels)
    features, places = classes.draw(20_000, torch.zeros(1, dtype=DOUBLE))
    for c in (0, 1):
        own, values = features[places == c], classes.classes[c]
        assert len(own) == 20_000
        error = values["root"].norm() / 20_000**0.5
        assert (own.mean(0) - values["mean"]).norm() < 5 * error
        torch.testing.assert_close(own.T.cov(), values["root"] @ values["root"].T, atol=0.05, rtol=0.05)


def test_its_state_goes_on_drawing_where_it_was():
    whole, again = Gaussians(seed=2), Gaussians(seed=9)
    whole.measure(drawn(0, 12, 3), torch.arange(12) % 3)
    whole.draw(5, torch.zeros(1))
    assert_plain({**whole.state_dict(), "generator": torch.zeros(1)})
    again.load_state_dict(whole.state_dict())
    for one, other in zip(whole.draw(5, torch.zeros(1)), again.draw(5, torch.zeros(1)), strict=True):
        assert torch.equal(one, other)


def test_alignment_trains_what_trains_of_a_head_and_tells_classes_apart():
    centres = 4 * torch.eye(5)[:3]
    classes = Gaussians(seed=3)
    classes.measure(centres[torch.arange(60) % 3] + 0.3 * drawn(1, 60, 5).float(), torch.arange(60) % 3)
    torch.manual_seed(0)
    head = Cosine(5, 3, scale=20.0)
    head.scale.requires_grad_(False)
    start = head.weight.detach().clone()
    Alignment(0.01, epochs=0).align(head, classes, cross_entropy)
    assert torch.equal(head.weight, start)
    Alignment(0.05, epochs=10, samples=32).align(head, classes, cross_entropy)
    assert head.scale.item() == 20.0
    assert head.weight.grad is None
    assert torch.equal(head(centres).argmax(1), torch.arange(3))
    assert not torch.equal((centres @ start.T).argmax(1), torch.arange(3))


def test_alignment_takes_the_steps_that_it_says():
    """One epoch in one step: the gradient of the loss on what is drawn, and weight decay."""
    classes, same = Gaussians(seed=3), Gaussians(seed=3)
    for one in (classes, same):
        one.measure(drawn(1, 8, 5), torch.zeros(8, dtype=torch.int64))
    head = Linear(5, 2).double()
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    weight = head.weight.detach().clone().requires_grad_()
    Alignment(0.1, epochs=1, samples=16).align(head, classes, cross_entropy)
    features, labels = same.draw(16, weight)
    cross_entropy(features @ weight.T, labels).backward()
    torch.testing.assert_close(head.weight.detach(), weight.detach() - 0.1 * (weight.grad + 5e-4 * weight.detach()))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda x: shifts(x, x, x, 0.0), "bandwidth=0.0"),
        (lambda x: shifts(x, x, x, 1.0, -1.0), "floor=-1.0"),
        (lambda x: shifts(x, x, x[:1], 1.0), "those of the same samples"),
        (lambda x: shifts(x, x[:0], x[:0], 1.0), "at least one"),
        (lambda x: shifts(x, x * torch.nan, x, 1.0), "features before"),
        (lambda x: shifts(x, x, x / 0, 1.0), "features after"),
        (lambda x: section_shifts(x, x, x, 2, -1.0), "bandwidth=-1.0"),
        (lambda x: section_shifts(x, x, x[:1], 2), "those of the same samples"),
        (lambda x: section_shifts(x, x[:0], x[:0], 2), "at least one"),
        (lambda _: Gaussians(jitter=0.0), "jitter=0.0"),
        (lambda _: Alignment(-1.0), "rate=-1.0"),
        (lambda _: Alignment(1.0, epochs=-1), "epochs=-1"),
        (lambda _: Alignment(1.0, samples=0), "samples=0"),
    ],
)
def test_errors_say_what_was_expected(use, message):
    with pytest.raises(ValueError, match=message):
        use(drawn(0, 3, 2))
