"""Which new samples an anchor takes: properties of the drawing."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetcast.forecast.network.draw import UNIFORM_SHARE, draw

FEW = settings(max_examples=40)
SEEDS = st.integers(0, 2**20)


@st.composite
def tasks(draw_, least: int = 1, most: int = 120):
    """Labels of n samples, and sizes of their gradients or none."""
    count = draw_(st.integers(least, most))
    generator = torch.Generator().manual_seed(draw_(SEEDS))
    labels = torch.randint(0, draw_(st.integers(1, 5)), (count,), generator=generator)
    power = draw_(st.sampled_from([None, 0, 1, 4]))
    return labels, None if power is None else torch.rand(count, generator=generator) ** power


@FEW
@given(tasks(), st.integers(1, 40), st.integers(0, 50), SEEDS)
def test_an_anchor(task, rows, index, seed):
    labels, scores = task
    places, weights = draw(labels, len(labels), scores, seed).anchor(index, rows)
    assert len(places) == len(weights) <= min(rows, len(labels))
    assert len(set(places.tolist())) == len(places)
    assert int(places.min()) >= 0
    assert int(places.max()) < len(labels)
    assert bool((weights > 0).all())
    assert abs(float(weights.sum()) - 1) < 1e-12


@FEW
@given(tasks(), SEEDS)
def test_probabilities(task, seed):
    labels, scores = task
    drawn = draw(labels, len(labels), scores, seed)
    assert sorted(drawn.order.tolist()) == list(range(len(labels)))
    assert bool((labels[drawn.order].diff() >= 0).all())  # class after class
    assert abs(float(drawn.probability.sum()) - 1) < 1e-12
    assert float(drawn.probability.min()) >= (UNIFORM_SHARE if scores is not None else 1) / len(labels) * (1 - 1e-9)
    if scores is not None:
        sizes = scores[drawn.order].double()
        rising = drawn.probability[sizes.argsort()]
        assert bool((rising.diff() >= -1e-15).all())


@FEW
@given(tasks(least=10), st.integers(1, 40), st.integers(0, 50), SEEDS)
def test_classes_keep_their_shares(task, rows, index, seed):
    """Of the marks; so of the samples, where none is marked twice."""
    labels, scores = task
    drawn = draw(labels, len(labels), scores, seed)
    places, weights = drawn.anchor(index, rows)
    marks = _marks(drawn, places, weights, rows)
    for label in labels.unique():
        share = float(drawn.probability[labels[drawn.order] == label].sum())
        assert abs(float(marks[labels[places] == label].sum()) - rows * share) < 1 + 1e-6


def _marks(drawn, places, weights, rows):
    """How often each sample was marked: weights are marks over probability, scaled."""
    probability = torch.empty_like(drawn.probability)
    probability[drawn.order] = drawn.probability
    share = weights * probability[places]
    marks = share / share.sum() * rows
    assert torch.allclose(marks, marks.round(), atol=1e-6)
    return marks.round()


@FEW
@given(st.integers(3, 40), st.integers(3, 8), st.integers(0, 30), SEEDS)
def test_anchors_in_a_row_share_no_sample_where_all_are_alike(rows, factor, index, seed):
    count = rows * factor
    drawn = draw(None, count, None, seed)
    first, second = (set(drawn.anchor(k, rows)[0].tolist()) for k in (index, index + 1))
    assert len(first) == len(second) == rows
    assert not first & second


@settings(max_examples=8)
@given(tasks(least=5), st.integers(1, 12), SEEDS)
def test_every_sample_is_marked_as_often_as_its_probability_says(task, rows, seed):
    labels, scores = task
    drawn = draw(labels, len(labels), scores, seed)
    anchors, total = 300, torch.zeros(len(labels), dtype=torch.float64)
    for index in range(anchors):
        places, weights = drawn.anchor(index, rows)
        total[places] += _marks(drawn, places, weights, rows)
    probability = torch.empty_like(drawn.probability)
    probability[drawn.order] = drawn.probability
    # a sample is marked for starts in an arc: the golden ratio fills arcs up to 1 + log_5(anchors) starts or so
    assert float((total - anchors * rows * probability).abs().max()) < 5


@settings(max_examples=8)
@given(tasks(least=5), SEEDS, SEEDS)
def test_the_mean_over_anchors_is_the_mean(task, seed, other):
    """Any function of the samples: where all are alike exactly, else up to a bias that falls as 1 / samples."""
    labels, scores = task
    count = len(labels)
    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(other), dtype=torch.float64)
    if scores is not None:
        values[:, 0] = scores  # a mean without weights would be far too large
    for sizes, allowed in ((None, 0.0), (scores, 1.0)):
        drawn = draw(labels, count, sizes, seed)
        for rows in (4, 16):
            means = []
            for index in range(150):
                places, weights = drawn.anchor(index, rows)
                means.append(weights @ values[places])
            error = (torch.stack(means).mean(0) - values.mean(0)).abs()
            assert bool((error < (0.05 + allowed / rows) * values.abs().amax(0).clamp_min(1e-9)).all())


def test_the_same_seed_draws_the_same():
    labels = torch.arange(50) % 3
    first, again, other = (draw(labels, 50, None, seed).anchor(2, 8)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
