"""The adapter that a sample's own answers lead to: a fixed point, found for each sample alone, by no label."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from forgetcast.heads.base import UNSEEN
from forgetcast.heads.retrieved import Retrieved, retrieved

WIDTH = 3


def drawn(seed: int, places: int, n: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, first logits, rows of a head, owners: two outputs a place and one of none."""
    draw = torch.Generator().manual_seed(seed)
    outputs = 2 * places + 1
    owner = torch.tensor([-1, *range(places), *range(places)])[torch.randperm(outputs, generator=draw)]
    shapes = (n, places, WIDTH), (n, outputs), (outputs, WIDTH)
    features, first, rows = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return features, first, rows, owner


def slowly(features: Tensor, first: Tensor, rows: Tensor, owner: list[int], rounds: int) -> tuple[Tensor, int, bool]:
    """One sample, in words: look, go where the answer belongs, until it is where one is."""
    own = [c for c, place in enumerate(owner) if place >= 0]
    following = owner[max(own, key=lambda c: first[c])]
    for _ in range(rounds):
        place = following
        logits = rows @ features[place]
        following = owner[max(own, key=lambda c: logits[c])]
        if following == place:
            return logits, place, True
    return logits, place, False


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6))
def test_each_sample_comes_where_it_comes_alone(seed, places, rounds):
    features, first, rows, owner = drawn(seed, places)
    logits, found = retrieved(features, first, lambda phi: phi @ rows.T, owner, rounds)
    for i in range(len(features)):
        expected, place, stays = slowly(features[i], first[i], rows, owner.tolist(), rounds)
        assert found[i] == place
        torch.testing.assert_close(logits[i, owner >= 0], expected[owner >= 0])
        if stays:
            assert owner[logits[i].argmax()] == place
    assert (logits[:, owner < 0] == UNSEEN).all()


@given(st.integers(0, 10**6))
def test_where_an_answer_stays_more_looks_change_nothing(seed):
    features, first, rows, owner = drawn(seed, 4)
    ends = [retrieved(features, first, lambda phi: phi @ rows.T, owner, rounds) for rounds in (6, 7, 50)]
    stays = owner[ends[0][0].argmax(1)] == ends[0][1]
    for logits, place in ends[1:]:
        assert torch.equal(place[stays], ends[0][1][stays])
        torch.testing.assert_close(logits[stays], ends[0][0][stays])


def test_a_circle_ends_with_the_last_look():
    """Each place says the other."""
    features, owner = torch.eye(2)[None], torch.tensor([0, 1])
    for rounds, last in ((1, 0), (2, 1), (3, 0), (4, 1)):
        logits, place = retrieved(features, torch.tensor([[1.0, 0.0]]), lambda phi: phi.flip(1), owner, rounds)
        assert place.tolist() == [last]
        assert logits.argmax(1).tolist() == [1 - last]


def head(places: int) -> tuple[Retrieved, Tensor]:
    """Two outputs a place, but for the last output, which has none yet."""
    draw = torch.Generator().manual_seed(places)
    made = Retrieved(WIDTH)
    for place in range(places):
        made.grow(2 * place + 2)
        labels = torch.tensor([2 * place, 2 * place + 1]).repeat(3)
        made.observe(torch.randn(6, WIDTH, generator=draw), labels, (2 * place, 2 * place + 1), place)
    made.grow(2 * places + 1)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=draw))
    return made, torch.randn(9, places, WIDTH, generator=draw)


@pytest.mark.parametrize("places", [1, 3])
def test_the_answer_is_the_logarithm_of_both_probabilities(places):
    made, features = head(places)
    own = 2 * places
    cosines = normalize(features[:, 0].double()) @ normalize(made.means.means[:own]).T
    logits, _ = retrieved(features, made.means(features[:, 0]), made, made.owner, 4)
    if places == 1:  # there is one adapter: plain prediction
        torch.testing.assert_close(logits[:, :own], made(features[:, 0])[:, :own])
    both = logits[:, :own].double().softmax(1) + (places * cosines).softmax(1)
    answer = made.answer(features, 4)
    torch.testing.assert_close(answer[:, :own].double(), both.log(), atol=1e-6, rtol=1e-6)
    assert (answer[:, own:] == UNSEEN).all()


def test_without_a_feature_nothing_is_known():
    made = Retrieved(WIDTH)
    made.grow(2)
    assert (made.answer(torch.zeros(5, 0, WIDTH), 4) == UNSEEN).all()


def test_a_state_fits_whatever_the_number_of_outputs():
    made, features = head(2)
    for other in (Retrieved(WIDTH), head(3)[0]):
        other.load_state_dict(made.state_dict())
        assert other.owner.tolist() == [0, 0, 1, 1, -1]
        assert torch.equal(other.answer(features, 4), made.answer(features, 4))
