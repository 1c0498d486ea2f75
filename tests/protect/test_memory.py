"""The reservoir is uniform, herding is greedy, both resume bit for bit; replay adds what its formula says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from torch.nn.functional import cross_entropy, normalize

from forgetcast.protect.memory import Exemplars, Reservoir, herding
from forgetcast.protect.replay import DarkReplay, Replay
from protect.models import assert_plain, moved, small_model, small_task


def numbers(first, last):
    return {"value": torch.arange(first, last)}


@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_reservoir_is_a_uniform_sample(chunk):
    items, capacity, runs = 60, 12, 400
    counts = torch.zeros(items, dtype=torch.float64)
    for seed in range(runs):
        reservoir = Reservoir(capacity, seed)
        for start in range(0, items, chunk):
            reservoir.add(numbers(start, min(start + chunk, items)))
        held = reservoir.columns["value"]
        assert len(set(held.tolist())) == len(reservoir) == capacity
        counts[held] += 1
    share = capacity / items
    # inclusions of one run sum to the capacity, hence items - 1 degrees of freedom and the factor
    statistic = (counts - runs * share).square().sum() / (runs * share * (1 - share)) * (items - 1) / items
    assert 1e-4 < chi2.sf(statistic.item(), items - 1) < 1 - 1e-4


def test_reservoir_holds_all_while_there_is_room_and_rows_stay_together():
    reservoir = Reservoir(10)
    reservoir.add({"a": torch.arange(6), "b": torch.arange(6) * 2.0})
    assert reservoir.columns["a"].tolist() == list(range(6))
    reservoir.add({"a": torch.arange(6, 50), "b": torch.arange(6, 50) * 2.0})
    assert torch.equal(reservoir.columns["b"], reservoir.columns["a"] * 2.0)
    drawn = reservoir.draw(4)
    assert len(set(drawn["a"].tolist())) == 4
    assert torch.equal(drawn["b"], drawn["a"] * 2.0)
    assert sorted(reservoir.draw(99)["a"].tolist()) == sorted(reservoir.columns["a"].tolist())


def test_reservoir_resumes_bit_for_bit():
    one, two = Reservoir(8, seed=3), Reservoir(8, seed=99)
    one.add(numbers(0, 30))
    assert_plain(one.state_dict())
    two.load_state_dict(one.state_dict())
    for reservoir in (one, two):
        reservoir.add(numbers(30, 80))
    assert torch.equal(one.columns["value"], two.columns["value"])
    assert torch.equal(one.draw(5)["value"], two.draw(5)["value"])


def test_reservoir_pads_columns_that_grow():
    reservoir = Reservoir(4)
    reservoir.add({"logits": torch.ones(2, 2)})
    reservoir.add({"logits": torch.ones(1, 3)})
    assert reservoir.columns["logits"].tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: Reservoir(0), "capacity=0; expected"),
        (lambda: Exemplars(0), "capacity=0; expected"),
        (lambda: Reservoir(3).draw(1), "empty memory; expected at least one"),
        (lambda: Reservoir(3).add({"a": torch.ones(2), "b": torch.ones(3)}), "lengths .*; expected equal lengths"),
    ],
)
def test_errors_say_what_was_expected(use, message):
    with pytest.raises(ValueError, match=message):
        use()


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 14), st.integers(0, 10_000))
def test_herding_is_the_greedy_choice(n, d, count, seed):
    phi = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    order = herding(phi, count).tolist()
    assert len(set(order)) == len(order) == min(count, n)
    mean = phi.mean(0)
    for k in range(1, len(order) + 1):
        distance = {
            row: (mean - (phi[order[: k - 1]].sum(0) + phi[row]) / k).norm().item()
            for row in set(range(n)) - set(order[: k - 1])
        }
        assert distance[order[k - 1]] <= min(distance.values()) + 1e-12


def test_exemplars_are_balanced_herded_and_shrink_from_the_end():
    model = small_model(outputs=4)
    whole, task = small_task(n=40, classes=(0, 1))
    memory = Exemplars(13)
    memory.remember(model, task)
    first = {label: columns["indices"].tolist() for label, columns in memory.classes.items()}
    for label in (0, 1):
        rows = (whole.labels == label).nonzero()[:, 0]
        phi = normalize(model.features(whole.inputs[rows]).detach())
        assert first[label] == rows[herding(phi, 6)].tolist()
        assert torch.equal(memory.classes[label]["inputs"], whole.inputs[first[label]])
    memory.remember(model, small_task(1, n=40, classes=(2, 3), seen=(0, 1, 2, 3), index=1)[1])
    assert {label: len(columns["labels"]) for label, columns in memory.classes.items()} == dict.fromkeys(range(4), 3)
    assert memory.classes[0]["indices"].tolist() == first[0][:3]
    other = Exemplars(13, seed=5)
    assert_plain(memory.state_dict())
    other.load_state_dict(memory.state_dict())
    assert torch.equal(memory.draw(5)["inputs"], other.draw(5)["inputs"])


def test_replay_is_cross_entropy_on_what_is_held():
    model = small_model(outputs=4)
    whole, task = small_task(classes=(0, 1))
    replay = Replay(Reservoir(100), count=100, strength=0.5)
    replay.begin_task(model, task)
    assert replay.loss(model, whole, model(whole.inputs)) is None
    replay.end_task(model, task)
    replay.begin_task(model, small_task(classes=(3,), seen=(0, 1, 3), index=1)[1])
    value = replay.loss(model, whole, model(whole.inputs))
    torch.testing.assert_close(value, 0.5 * cross_entropy(model(whole.inputs)[:, [0, 1, 3]], whole.labels))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_dark_replay_compares_the_logits_of_then(beta):
    model = small_model(outputs=2)
    whole, task = small_task(classes=(0, 1))
    replay = DarkReplay(100, count=100, alpha=0.3, beta=beta)
    replay.begin_task(model, task)
    then = model(whole.inputs).detach()
    assert replay.loss(model, whole, then) is None
    model.head.grow(3)
    moved(model)
    second, task = small_task(1, classes=(2,), seen=(0, 1, 2), index=1)
    replay.begin_task(model, task)
    now = model(whole.inputs)
    expected = 0.3 * (now[:, :2] - then).square().mean() + beta * cross_entropy(now, whole.labels)
    logits = model(second.inputs)
    torch.testing.assert_close(replay.loss(model, second, logits), expected)
    assert replay.memory.columns["width"].tolist() == [2] * 12 + [3] * 12
    assert torch.equal(replay.memory.columns["logits"][12:], logits.detach())
    other = DarkReplay(100, count=100, alpha=0.3, beta=beta, seed=8)
    assert_plain(replay.state_dict())
    other.load_state_dict(replay.state_dict())
    assert other.loss(model, second, logits) == replay.loss(model, second, logits)
