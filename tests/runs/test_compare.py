"""Comparisons on small exact examples, and the coverage of the interval."""

from itertools import product
from statistics import fmean

import numpy as np
import pytest

from forgetcast.metrics.definitions import RUN_DEFINITIONS
from forgetcast.metrics.matrix import METRICS
from forgetcast.runs.compare import DIRECTIONS, bootstrap_interval, compare
from forgetcast.runs.expected import NAMES
from forgetcast.runs.references import REFERENCED


def records(name, values, metric="last_accuracy", **more):
    return [
        {
            "recipe": {"name": name, "method": {"name": "plain"}, "seed": seed, "checkpoint": {"keep": seed + 1}}
            | more,
            "seed": seed,
            "state": "finished",
            "metrics": {metric: value},
        }
        for seed, value in values.items()
    ]


def test_small_example():
    first = records("first", {0: 0.5, 1: 0.7, 2: 0.6, 9: 0.0})
    second = records("second", {2: 0.6, 1: 0.6, 0: 0.8, 7: 1.0, 8: 1.0})
    comparison = compare([*first, *second], "last_accuracy")
    assert [spread.recipe for spread in comparison.spreads] == ["first", "second"]
    assert comparison.spreads[0].mean == pytest.approx(0.45)
    assert comparison.spreads[0].std == pytest.approx(0.3109126351)
    assert comparison.definition == "Mean accuracy over all tasks after the last one."
    (pair,) = comparison.differences
    assert (pair.seeds, pair.unpaired) == ((0, 1, 2), 3)
    assert pair.mean == pytest.approx(0.2 / 3)
    assert pair.std == pytest.approx(np.std([0.3, -0.1, 0.0], ddof=1))
    assert (pair.wins, pair.ties, pair.losses) == (1, 1, 1)
    assert pair.no_interval is None
    assert pair.interval[0] < pair.mean < pair.interval[1]


def test_lower_is_better_for_forgetting():
    both = records("a", {0: 0.5, 1: 0.5}, "first_minus_last") + records("b", {0: 0.4, 1: 0.6}, "first_minus_last")
    both += records("c", {0: 0.1, 1: 0.2}, "first_minus_last")
    pairs = {(pair.first, pair.second): pair for pair in compare(both, "first_minus_last").differences}
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert (pairs["a", "c"].wins, pairs["a", "c"].losses) == (2, 0)
    assert pairs["a", "c"].mean == pytest.approx(-0.35)
    assert (pairs["a", "b"].wins, pairs["a", "b"].losses) == (1, 1)


def test_a_metric_of_ones_own_needs_a_direction():
    both = records("a", {0: 1.0, 1: 1.0}, "seconds") + records("b", {0: 2.0, 1: 3.0}, "seconds")
    assert compare(both, "seconds", better="lower").differences[0].losses == 2
    assert compare(both, "seconds", better="higher").differences[0].wins == 2
    with pytest.raises(ValueError, match="metric='seconds' it is not known whether more is better; .*better='higher'"):
        compare(both, "seconds")


def test_every_metric_has_one_direction():
    more = {*NAMES, *REFERENCED} - METRICS.keys()
    assert {name for name in METRICS if not name.endswith("accuracy")} | more == DIRECTIONS.keys()
    assert more <= RUN_DEFINITIONS.keys()


def test_rounding_is_a_tie():
    both = records("a", {0: 0.1 + 0.2, 1: 0.5}) + records("b", {0: 0.3, 1: 0.5})
    assert compare(both, "last_accuracy").differences[0].ties == 2


@pytest.mark.parametrize(("seeds", "mean"), [({5: 0.5}, None), ({0: 0.5}, pytest.approx(0.1))])
def test_no_interval_from_fewer_than_two_pairs(seeds, mean):
    (pair,) = compare([*records("a", {0: 0.4}), *records("b", seeds)], "last_accuracy").differences
    assert (pair.mean, pair.std, pair.interval) == (mean, None, None)
    assert pair.no_interval == f"an interval needs at least 2 paired seeds, and there are {len(pair.seeds)}"


def test_recipes_of_one_name_are_told_apart_by_what_differs():
    both = records("a", {0: 0.4}, epochs=1) + records("a", {0: 0.4}, epochs=2) + records("b", {0: 0.4}, epochs=3)
    labels = [spread.recipe for spread in compare(both, "last_accuracy").spreads]
    assert labels == ["a (epochs=1)", "a (epochs=2)", "b"]


def test_order_of_records_changes_nothing_but_the_order_of_recipes():
    both = records("a", {0: 0.4, 1: 0.6, 2: 0.5}) + records("b", {0: 0.6, 1: 0.5, 2: 0.9})
    shuffled = [both[index] for index in (2, 0, 5, 4, 1, 3)]
    assert compare(shuffled, "last_accuracy") == compare(both, "last_accuracy")


def test_interval_of_two_values_is_their_exact_one():
    # The mean of two draws is low, middle or high with 1/4, 1/2, 1/4: the 50% interval within, the 95% one at the ends.
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5)


def test_interval_against_all_resamples():
    values = [0.0, 0.1, 0.25, 0.7, 1.9]
    means = [fmean(draw) for draw in product(values, repeat=5)]
    exact = np.quantile(means, [0.025, 0.975])
    assert bootstrap_interval(values) == pytest.approx(exact, abs=0.03)


def test_the_seed_decides_the_interval():
    values = np.linspace(0, 1, 30).tolist()
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)


def test_coverage():
    generator = np.random.default_rng(0)
    trials, covered = 400, 0
    for trial in range(trials):
        low, high = bootstrap_interval(generator.normal(0.3, 1.0, 20).tolist(), resamples=1000, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / trials <= 0.97


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (records("a", {1: 0.5}), "records of 1 recipes; expected at least two recipes. Add"),
        (records("b", {0: 0.5}) * 2, "two records of the recipe b with seed 0; expected one record for each.*Leave"),
        ([records("b", {0: 0.5})[0] | {"state": "running"}], "state 'running'.*; expected the record of a finished"),
        ([records("b", {0: 0.5})[0] | {"recipe": 3}], "a recipe int; expected"),
        ([records("b", {0: 0.5})[0] | {"metrics": {"first": 1}}], "record of b with last_accuracy=None; expected"),
        (records("b", {0: None}), "record of b with last_accuracy=None; expected a number"),
    ],
)
def test_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        compare([*records("a", {0: 0.5}), *wrong], "last_accuracy")


@pytest.mark.parametrize("bad", [{"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}, {"seed": -1}])
def test_refused_settings(bad):
    with pytest.raises(ValueError, match=f"got {next(iter(bad))}="):
        bootstrap_interval([0.0, 1.0], **bad)
    with pytest.raises(ValueError, match="1 values; expected at least two"):
        bootstrap_interval([0.0])


def test_memory_is_that_after_the_last_task_and_what_a_task_adds():
    kept = [[100, 130, 170], [100, 110, 130]]
    grows = [one | {"stored_numbers": own} for one, own in zip(records("a", {0: 0.5, 1: 0.5}), kept, strict=True)]
    other = [one | {"stored_numbers": [40]} for one in records("b", {0: 0.5})]
    unsaid = [records("c", {0: 0.5, 1: 0.5})[0] | {"stored_numbers": [1, 2]}, records("c", {1: 0.5})[0]]
    spreads = compare([*grows, *other, *unsaid], "last_accuracy").spreads
    assert [(one.stored, one.growth) for one in spreads] == [(150, 25), (40, None), (None, None)]
