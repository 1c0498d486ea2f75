"""The choice between points, as a pure function of them; and the nested candidates."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import NETWORKS, network_and_task
from torch import nn

import forgetcast as fc
from forgetcast.forecast.network.choice import Point, choose, non_dominated, told

SHARES = st.integers(0, 8).map(lambda k: k / 8)  # few values, so that there are ties
LIMITS = st.none() | SHARES


def point(old, new, trained=10, length=1.0, *, now=1.0, weight=0.5, trusted=True):
    candidate = fc.Candidate(f"{trained}", ("weight",))
    score = weight * old + (1 - weight) * new
    reason = "exact" if trusted else "not to be trusted (few samples read)"
    return Point(candidate, length, trained, old, now - old, new, score, 0.1, 30, trusted, reason)


ROWS = st.lists(st.tuples(SHARES, SHARES, st.integers(1, 4), SHARES), min_size=1, max_size=12)


@given(ROWS, LIMITS)
def test_the_best_within_the_limit_is_chosen(rows, limit):
    points = [point(*row) for row in rows]
    best = choose(points, limit)
    fine = [each for each in points if limit is None or each.drop <= limit]
    if not fine:
        assert best.drop == min(each.drop for each in points)
        return
    assert best in fine
    assert best.score == max(each.score for each in fine)
    assert best.trained == min(each.trained for each in fine if each.score == best.score)


@given(ROWS, LIMITS)
def test_the_choice_does_not_depend_on_the_order(rows, limit):
    first, second = (choose([point(*row) for row in some], limit) for some in (rows, rows[::-1]))
    assert (first.score, first.trained, first.length) == (second.score, second.trained, second.length)


@given(ROWS)
def test_the_frontier_is_what_no_other_beats(rows):
    points = [point(*row) for row in rows]

    def beats(one, other):
        no_worse = one.drop <= other.drop and one.new_accuracy >= other.new_accuracy
        return no_worse and (one.drop, one.new_accuracy) != (other.drop, other.new_accuracy)

    kept = non_dominated(points)
    best = {(p.drop, p.new_accuracy) for p in points if not any(beats(other, p) for other in points)}
    assert [(p.drop, p.new_accuracy) for p in kept] == sorted(best)
    for each in kept:
        equal = [p for p in points if (p.drop, p.new_accuracy) == (each.drop, each.new_accuracy)]
        assert each.trained == min(p.trained for p in equal)


def test_a_choice_in_words():
    few, many = point(0.9, 0.5, 10), point(0.5, 1.0, 40, trusted=False)
    text = told(few, [few, many], 0.2)
    assert text == (
        "'10' (10 of 40 parameters): forecast old accuracy 90.0% (drop 10.0), new 50.0%; "
        "'40' would have old accuracy 50.0% (drop 50.0), new 100.0%"
    )
    alone = told(many, [few, many])
    assert "would have" not in alone
    assert alone.endswith("; not to be trusted (few samples read)")
    assert told(few, [few, many], 0.05).startswith("nothing stays within a drop of 5.0 points; the least drop has '10'")
    assert told(point(0.9, 0.5, 40, 0.5), [many]).startswith("'40' at 0.5 of the way (40 of 40")


def test_what_cannot_be_chosen_from(unchecked_types):
    with pytest.raises(ValueError, match="got no point; expected at least one"):
        choose([])
    for limit in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="got max_drop=.*; expected a finite number of at least 0 and at most 1"):
            choose([point(1.0, 1.0)], limit)


@pytest.mark.parametrize("name", NETWORKS)
def test_candidates_are_nested_and_all_have_the_head(name):
    model, old, _ = network_and_task(name)
    found = fc.candidates(model, old)
    assert (found[0].name, found[-1].name) == ("head", "all")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(found[-1].parameters) == trained
    for smaller, larger in pairwise(found):
        assert set(smaller.parameters) < set(larger.parameters)
        assert len(set(larger.parameters)) == len(larger.parameters)
    head = model[-1] if name == "perceptron" else model.head
    own = {id(parameter) for parameter in head.parameters()}
    assert {id(dict(model.named_parameters())[name]) for name in found[0].parameters} == own


class HeadFirst(nn.Module):
    """A model whose head is registered before its body."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_blocks_double_and_the_head_is_the_last_layer_called():
    found = fc.candidates(HeadFirst(9), torch.randn(4, 3))
    assert [each.name for each in found] == ["head", "last 1", "last 2", "last 4", "last 8", "all"]
    assert set(found[0].parameters) == {"head.weight", "head.bias"}
    assert set(found[2].parameters) == {
        f"{block}.{kind}" for block in ("head", "blocks.8.0", "blocks.7.0") for kind in ("weight", "bias")
    }


def test_counts_of_blocks():
    found = fc.candidates(HeadFirst(3), torch.randn(4, 3), counts=(3, 0, 2))
    assert [each.name for each in found] == ["all", "head", "last 2"]
    for wrong in ((4,), (-1,)):
        with pytest.raises(ValueError, match=r"got a count of -?\d modules; expected counts from 0 to 3"):
            fc.candidates(HeadFirst(3), torch.randn(4, 3), counts=wrong)


def test_candidates_of_some_parameters_only():
    model, inputs = HeadFirst(3), torch.randn(4, 3)
    frozen = fc.candidates(model, inputs, parameters=lambda name, _: name.startswith("blocks"))
    assert [each.name for each in frozen] == ["last 1", "last 2", "all"]  # no head that may train
    named = fc.candidates(model, inputs, modules=["blocks.1*", "blocks.[02]*"])
    assert [len(each.parameters) for each in named] == [2, 6, 8]
    alone = fc.candidates(model, inputs, parameters=["head.weight"])
    assert alone == (fc.Candidate("head", ("head.weight",)),)


def test_bad_candidates():
    with pytest.raises(ValueError, match=r"a candidate 'none' of 0 parameters; expected a name, and at least one"):
        fc.Candidate("none", ())
    with pytest.raises(ValueError, match="a candidate '' of 1 parameters"):
        fc.Candidate("", ("weight",))
    model, inputs = HeadFirst(2), torch.randn(4, 3)
    with pytest.raises(ValueError, match="the pattern 'bolcks.*'; expected one that fits a trained name"):
        fc.candidates(model, inputs, modules=["bolcks.*"])
    with pytest.raises(ValueError, match="leaves none of the model's 6"):
        fc.candidates(model.requires_grad_(False), inputs)
    with pytest.raises(ValueError, match="the parameter name 'haed.weight'.*nearest are .*head.weight"):
        fc.candidates(model, inputs, parameters=["haed.weight"])
