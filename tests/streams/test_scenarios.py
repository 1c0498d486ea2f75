"""Class-incremental streams: every sample once, classes in order, everything reproducible from the seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import Source, digits


@given(increment=st.integers(1, 10), seed=st.integers(0, 50))
def test_tasks_partition_classes_and_samples(increment, seed):
    source = digits()
    stream = class_incremental(source, increment, seed=seed)
    assert [c for task in stream.tasks for c in task.classes] == list(range(10))
    samples = np.concatenate([part for task in stream.tasks for part in (task.train, task.test)])
    assert sorted(samples) == list(range(1797))
    for task in stream.tasks:
        assert set(stream.outputs[task.train]) == set(stream.outputs[task.test]) == set(task.classes)
        labels = {stream.class_order[c] for c in task.classes}
        assert set(source.labels[task.train]) == labels


def test_seed_and_order_are_data_on_the_stream():
    source = digits()
    first, again, other = (class_incremental(source, 2, seed=seed) for seed in (3, 3, 4))
    assert first.split_hash == again.split_hash != other.split_hash
    given_order = class_incremental(source, 5, class_order=range(10))
    assert given_order.class_order == tuple(range(10))
    assert np.array_equal(given_order.outputs, source.labels)


def test_own_test_split_is_kept():
    source = Source("mine", np.eye(8, dtype=np.float32), np.arange(8) % 2, test=np.arange(4, 8))
    stream = class_incremental(source, 1)
    assert sorted(np.concatenate([task.test for task in stream.tasks])) == [4, 5, 6, 7]


def test_wrong_orders_are_refused():
    with pytest.raises(ValueError, match=r"class_order=\[0, 1\]; expected every label of the source once"):
        class_incremental(digits(), 2, class_order=[0, 1])
    alone = Source("mine", np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1]), test=np.array([0, 1]))
    with pytest.raises(ValueError, match="task 0 has . training and . test samples; expected at least one of each"):
        class_incremental(alone, 1, class_order=[0, 1])
