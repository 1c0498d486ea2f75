"""What holds for every stream, whatever the scenario: nothing twice, exact counts, all from the seed."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetcast.streams.domains import domain_incremental
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import Source, arrays
from forgetcast.streams.variants import blurry, few_shot, long_tailed

few_examples = settings(max_examples=25)


def small_source(name="small", classes=6, each=20):
    labels = np.arange(classes * each) % classes
    return Source(name, np.arange(classes * each, dtype=np.float32)[:, None], labels)


def samples(stream):
    return np.concatenate([part for task in stream.tasks for part in (task.train, task.validation, task.test)])


def counts(stream):
    train = np.concatenate([task.train for task in stream.tasks])
    return np.bincount(stream.outputs[train], minlength=len(stream.class_order)).tolist()


SCENARIOS = {
    "equal": lambda seed: class_incremental(small_source(), 2, seed=seed, validation_share=0.2),
    "base": lambda seed: class_incremental(small_source(), 2, base=3, seed=seed, validation_share=0.2),
    "groups": lambda seed: class_incremental(small_source(), groups=[[5], [0, 1, 2], [4, 3]], seed=seed),
    "domain": lambda seed: domain_incremental([small_source("a"), small_source("b", each=30)], seed=seed),
    "blurry": lambda seed: blurry(class_incremental(small_source(), 2, seed=seed), 0.25),
    "long-tailed": lambda seed: long_tailed(class_incremental(small_source(), 2, seed=seed), imbalance=8),
    "few-shot": lambda seed: few_shot(small_source(), base=2, ways=2, shots=3, seed=seed),
}


@pytest.mark.parametrize("name", SCENARIOS)
@few_examples
@given(seed=st.integers(0, 1000))
def test_no_sample_twice_and_all_from_the_seed(name, seed):
    stream, again, other = (SCENARIOS[name](s) for s in (seed, seed, seed + 1))
    found = samples(stream)
    assert len(set(found.tolist())) == len(found)
    assert set(found) <= set(range(len(stream.source)))
    assert stream.split_hash == again.split_hash != other.split_hash
    assert np.array_equal(np.array(stream.class_order)[stream.outputs], stream.source.labels)


@few_examples
@given(
    increment=st.integers(1, 6),
    base=st.none() | st.integers(1, 6),
    share=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 1000),
)
def test_class_incremental_partitions_classes_and_samples(increment, base, share, seed):
    stream = class_incremental(small_source(), increment, base=base, validation_share=share, seed=seed)
    assert [output for task in stream.tasks for output in task.classes] == list(range(6))
    assert len(stream[0].classes) == min(base or increment, 6)
    assert sorted(samples(stream)) == list(range(120))
    for task in stream.tasks:
        for part in (task.train, task.test, *([task.validation] if share else [])):
            assert set(stream.outputs[part]) == set(task.classes)
        assert len(task.validation) == len(task.classes) * round(share * 16)


def test_groups_come_in_the_given_order_by_label_or_name():
    stream = SCENARIOS["groups"](0)
    assert stream.class_order == (5, 0, 1, 2, 4, 3)
    assert [task.classes for task in stream.tasks] == [(0,), (1, 2, 3), (4, 5)]
    named = arrays(np.eye(20), ["cat", "dog", "emu", "fox"] * 5)
    by_name = class_incremental(named, groups=[["fox", "cat"], ["dog", "emu"]])
    assert by_name.class_order == (3, 0, 1, 2)
    with pytest.raises(ValueError, match="Did you mean 'emu'"):
        class_incremental(named, groups=[["fox", "cat"], ["dog", "emus"]])


def test_every_setting_is_in_the_hash():
    stream = class_incremental(small_source(), 2, class_order=range(6))
    others = [
        replace(stream, task_incremental=True),
        replace(stream, online=True),
        replace(stream, scenario="other"),
        replace(stream, settings={}),
        replace(stream, class_order=(1, 0, 2, 3, 4, 5)),
        replace(stream, tasks=stream.tasks[::-1]),
        replace(stream, tasks=(replace(stream[0], validation=stream[0].train[:1]), *stream.tasks[1:])),
    ]
    assert len({stream.split_hash, *(other.split_hash for other in others)}) == 8


def test_flags():
    stream = class_incremental(small_source(), 2, task_incremental=True, online=True)
    assert stream.task_incremental
    assert stream.online
    assert stream.scenario == "task-incremental"
    assert domain_incremental([small_source(), small_source()], online=True).online


def test_domains_keep_their_own_samples_and_split():
    first, second = small_source("a"), replace(small_source("b"), test=np.arange(60, 120))
    stream = domain_incremental([first, second], validation_share=0.2)
    assert stream.source.name == "a+b"
    assert len(stream.source) == 240
    assert [task.classes for task in stream.tasks] == [tuple(range(6))] * 2
    assert sorted(samples(stream)) == list(range(240))
    assert stream[0].train.max() < 120
    assert stream[1].test.tolist() == list(range(180, 240))
    assert np.array_equal(stream.source.take(stream[1].test)[:, 0], np.arange(60, 120))
    assert sorted(stream.source.test) == sorted(np.concatenate([task.test for task in stream.tasks]))
    with pytest.raises(ValueError, match=r"c has the labels \[0, 1\].*expected those of a"):
        domain_incremental([first, small_source("c", classes=2)])
    with pytest.raises(ValueError, match="d: texts of shape .*expected features as in a"):
        domain_incremental([first, arrays(["t"] * 120, np.arange(120) % 6, name="d")])
    with pytest.raises(ValueError, match="got 1 sources; expected at least two"):
        domain_incremental([first])


@few_examples
@given(share=st.floats(0.05, 0.95), disjoint=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 1000))
def test_blurry_share_is_met_exactly(share, disjoint, seed):
    plain = class_incremental(small_source(), 2, seed=seed)
    stream = blurry(plain, share, disjoint=disjoint)
    assert sorted(samples(stream)) == sorted(samples(plain))
    leaked = [
        sum(int(np.sum(stream.outputs[task.train] == output)) for task in stream.tasks if output not in task.classes)
        for output in range(6)
    ]
    assert sorted(leaked) == sorted([0] * round(6 * disjoint) + [round(share * 16)] * (6 - round(6 * disjoint)))
    for before, after in zip(plain.tasks, stream.tasks, strict=True):
        assert np.array_equal(before.test, after.test)


def test_head_is_wide_enough_for_what_leaks():
    plain = class_incremental(small_source(), 2)
    assert [plain.outputs_after(index) for index in range(3)] == [2, 4, 6]
    assert blurry(plain, 0.5).outputs_after(0) == 6


@few_examples
@given(imbalance=st.sampled_from([1.0, 2.0, 4.0, 16.0]), ordered=st.booleans(), seed=st.integers(0, 1000))
def test_long_tailed_counts_are_exact(imbalance, ordered, seed):
    plain = class_incremental(small_source(), 2, seed=seed)
    stream = long_tailed(plain, imbalance=imbalance, ordered=ordered)
    by_hand = {
        1.0: [16, 16, 16, 16, 16, 16],
        2.0: [16, 13, 12, 10, 9, 8],
        4.0: [16, 12, 9, 6, 5, 4],
        16.0: [16, 9, 5, 3, 1, 1],
    }[imbalance]
    assert (counts(stream) if ordered else sorted(counts(stream), reverse=True)) == by_hand
    for before, after in zip(plain.tasks, stream.tasks, strict=True):
        assert set(after.train) <= set(before.train)
        assert np.array_equal(before.test, after.test)


def test_sizes_that_are_whole_numbers_are_not_rounded_down():
    plain = class_incremental(small_source(each=40), 2)
    assert counts(long_tailed(plain, imbalance=32)) == [32, 16, 8, 4, 2, 1]


def test_shuffled_tail_does_not_follow_the_class_order():
    orders = {tuple(counts(long_tailed(SCENARIOS["equal"](s), imbalance=8, ordered=False))) for s in range(5)}
    assert len(orders) > 1
    assert any(list(order) != sorted(order, reverse=True) for order in orders)


@few_examples
@given(ways=st.sampled_from([1, 2, 4]), shots=st.integers(1, 16), seed=st.integers(0, 1000))
def test_few_shot_counts_are_exact(ways, shots, seed):
    stream = few_shot(small_source(), base=2, ways=ways, shots=shots, seed=seed)
    assert [len(task.classes) for task in stream.tasks] == [2] + [ways] * (4 // ways)
    assert counts(stream) == [16, 16] + [shots] * 4
    assert sum(len(task.test) for task in stream.tasks) == 24


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: class_incremental(s, groups=[[0, 1, 2], [2, 3, 4, 5]]), r"more than once: \[2\]"),
        (lambda s: class_incremental(s, groups=[[0, 1, 2], [3, 4, 5, 9]]), r"Unknown: \[9\]"),
        (lambda s: class_incremental(s, groups=[[0, 1, 2], [3, 4]]), r"missing: \[5\]"),
        (lambda s: class_incremental(s, groups=[range(6), []]), "group 1 is empty; expected at least one class"),
        (lambda s: class_incremental(s, 2, groups=[range(6)]), "expected groups alone"),
        (lambda s: class_incremental(s, 2, base=7), "got base=7; expected at most the source's 6 classes"),
        (lambda s: class_incremental(s), "got increment=None; expected an integer of at least 1"),
        (lambda s: class_incremental(s, 2, test_share=0.01), "expected classes that are large enough"),
        (lambda s: class_incremental(replace(s, test=np.arange(108)), 2, validation_share=0.9), "validation_share"),
        (lambda s: few_shot(s, base=2, ways=3, shots=1), "base=2, ways=3 with 6 classes; expected some later classes"),
        (lambda s: few_shot(s, base=6, ways=1, shots=1), "expected some later classes"),
        (lambda s: few_shot(s, base=2, ways=2, shots=17), "16 training samples; expected at least 17"),
        (lambda s: long_tailed(class_incremental(s, 2), imbalance=17), "got imbalance=17 .*expected at most 16"),
        (lambda s: blurry(class_incremental(s, 6), 0.1), "expected at least two tasks, each class in one"),
        (lambda s: blurry(domain_incremental([s, s]), 0.1), "expected at least two tasks, each class in one"),
        (lambda s: blurry(class_incremental(s, 2), 0.0), "got share=0.0; expected a finite number above 0"),
    ],
)
def test_what_cannot_be_built_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(small_source())
