"""Hand-written logits, numbers computed by hand."""

import pytest
import torch

from forgetcast.metrics.predictions import (
    calibration_error,
    class_incremental_accuracy,
    expected_calibration_error,
    per_class_accuracy,
    per_class_drop,
    task_incremental_accuracy,
)

LABELS = torch.tensor([0, 1, 2, 3, 3])
LOGITS = torch.tensor(
    [
        [3.0, 1.0, 0.0, 0.0],  # right
        [0.0, 2.0, 5.0, 0.0],  # wrong task, right within the own one
        [0.0, 0.0, 1.0, 2.0],  # wrong within the own task
        [0.0, 0.0, 1.0, 2.0],  # right
        [9.0, 0.0, 1.0, 2.0],  # wrong task, right within the own one
    ]
)


def test_being_told_the_task_helps():
    assert class_incremental_accuracy(LOGITS, LABELS) == pytest.approx(2 / 5)
    assert task_incremental_accuracy(LOGITS, LABELS, [[0, 1], [2, 3]]) == pytest.approx(4 / 5)
    assert task_incremental_accuracy(LOGITS, LABELS, [[3, 2, 1, 0]]) == pytest.approx(2 / 5)


def test_class_by_class():
    accuracy = per_class_accuracy(LOGITS, LABELS)
    assert accuracy == {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.5}
    assert per_class_drop({0: 1.0, 3: 0.75}, accuracy) == {0: 0.0, 3: 0.25}
    with pytest.raises(ValueError, match=r"classes \[7\] measured before only; expected"):
        per_class_drop({7: 1.0}, accuracy)


def test_calibration_error_by_hand():
    # confidences .5 (right), .5 (wrong), .9 (right), .96 (wrong): bins (7/15, 8/15], (13/15, 14/15], (14/15, 1]
    top = torch.tensor([0.5, 0.5, 0.9, 0.96], dtype=torch.float64)
    logits = torch.stack([top, (1 - top) * 0.6, (1 - top) * 0.4], 1).log()
    labels = torch.tensor([0, 1, 0, 2])
    assert expected_calibration_error(logits, labels) == pytest.approx((0.0 + 0.1 + 0.96) / 4)
    # one bin: |2 / 4 - mean confidence .715|
    assert expected_calibration_error(logits, labels, bins=1) == pytest.approx(0.215)


def test_full_confidence_is_in_the_last_bin():
    # confidences 1 (right) and .95 (wrong) share the bin (14/15, 1]: |1 - 1.95| / 2
    logits = torch.tensor([[1000.0, 0.0], [0.95, 0.05]], dtype=torch.float64)
    logits[1] = logits[1].log()
    assert expected_calibration_error(logits, torch.tensor([0, 1])) == pytest.approx(0.95 / 2)


@pytest.mark.parametrize("labels", [torch.tensor([], dtype=torch.int64), torch.tensor([4]), torch.tensor([-1])])
@pytest.mark.parametrize("measure", [class_incremental_accuracy, per_class_accuracy, expected_calibration_error])
def test_labels_must_be_outputs(measure, labels):
    with pytest.raises(ValueError, match="labels .*expected at least one label"):
        measure(LOGITS[: len(labels)], labels)


@pytest.mark.parametrize("tasks", [[[0, 1], [1, 2, 3]], [[0, 1], [2, 9]], [[0, 1], [2]]])
def test_tasks_must_own_the_labels(tasks):
    with pytest.raises(ValueError, match="task.*expected"):
        task_incremental_accuracy(LOGITS, LABELS, tasks)


def test_calibration_error_refuses_what_is_no_confidence():
    with pytest.raises(ValueError, match=r"confidences of shape \(2,\) outside \[0, 1\]; expected"):
        calibration_error(torch.tensor([0.5, 1.5]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="of no samples"):
        calibration_error(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
