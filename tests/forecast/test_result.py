"""Accuracy, broken answers and calibration on logits written by hand."""

from types import SimpleNamespace

import pytest
import torch

import forgetcast as fc
from builders import DOUBLE, train

BEFORE = torch.tensor([[2, 1, 0], [0, 3, 1], [1, 0, 4], [5, 0, 1], [0, 1, 2], [3, 2, 0]], dtype=DOUBLE)
AFTER = torch.tensor([[2, 1, 0], [0, 3, 4], [1, 0, 4], [0, 0, 1], [0, 3, 2], [1, 2, 0]], dtype=DOUBLE)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])  # right before: 0, 1, 2, 3; right after: 0, 2, 4


def forecast(drift=None, targets=LABELS):
    return fc.Forecast(AFTER - BEFORE if drift is None else drift, BEFORE, targets)


def test_accuracy_and_broken():
    result = forecast()
    assert torch.equal(result.logits, AFTER)
    assert result.accuracy_before == pytest.approx(4 / 6)
    assert result.accuracy == pytest.approx(3 / 6)
    assert result.broken.tolist() == [False, True, False, True, False, False]


def test_per_class():
    table = forecast().per_class
    assert table.index.tolist() == [0, 1, 2]
    assert table["samples"].tolist() == [2, 2, 2]
    assert table["accuracy_before"].tolist() == [1.0, 0.5, 0.5]
    assert table["accuracy"].tolist() == [0.5, 0.5, 0.5]
    assert table["drop"].tolist() == [0.5, 0.0, 0.0]
    # squared drifts: 0, 9, 0, 25, 4, 4
    assert table["drift"].tolist() == pytest.approx([12.5**0.5, 6.5**0.5, 2**0.5])


def test_sizes_of_drift():
    result = forecast()
    assert result.mean_squared_drift == pytest.approx(42 / 6)
    assert result.relative_drift == pytest.approx((42 / float(BEFORE.square().sum())) ** 0.5)
    zero = fc.Forecast(torch.ones(2, 2), torch.zeros(2, 2), None)
    assert zero.relative_drift == float("inf")


def test_a_perfect_forecast():
    result = forecast().compare(AFTER)
    assert (result.relative_error, result.cosine, result.one_minus_cosine, result.accuracy_error) == (0, 1, 0, 0)
    assert (result.broken_precision, result.broken_recall) == (1, 1)
    assert result.rank_correlation == pytest.approx(1)


def test_a_wrong_forecast():
    measured = BEFORE.clone()
    measured[1] = torch.tensor([4.0, 3, 1])  # breaks 1
    measured[2] = torch.tensor([5.0, 0, 4])  # breaks 2
    result = forecast().compare(measured)
    drift, truth = (AFTER - BEFORE).flatten(), (measured - BEFORE).flatten()
    assert result.relative_error == pytest.approx(float((drift - truth).norm() / truth.norm()))
    assert result.cosine == pytest.approx(float(torch.cosine_similarity(drift, truth, 0)))
    assert result.measured_accuracy == pytest.approx(2 / 6)
    assert result.accuracy_error == pytest.approx(1 / 6)
    assert result.broken_precision == result.broken_recall == 0.5
    assert result.rank_correlation == pytest.approx(-1)  # drops: forecast .5, 0, 0, measured 0, .5, .5


def test_small_angles_do_not_cancel():
    drift = torch.zeros(6, 3, dtype=DOUBLE)
    drift[0, 0] = 1.0
    measured = BEFORE * 0 + drift
    measured[0, 1] = 1e-8  # 1 - cos = 5e-17, which 1 - cosine cannot hold
    result = fc.Forecast(drift, torch.zeros_like(BEFORE), LABELS).compare(measured)
    assert result.one_minus_cosine == pytest.approx(5e-17, rel=1e-6)


def test_what_has_no_value_is_none():
    still = forecast(torch.zeros_like(BEFORE))
    result = still.compare(AFTER)
    assert result.cosine is result.one_minus_cosine is result.rank_correlation is result.broken_precision is None
    assert result.broken_recall == 0
    assert still.compare(BEFORE).relative_error == 0
    assert forecast().compare(BEFORE).relative_error == float("inf")
    unlabelled = forecast(targets=None).compare(AFTER)
    assert unlabelled.accuracy is unlabelled.measured_accuracy is unlabelled.rank_correlation is None
    assert unlabelled.relative_error == 0


@pytest.mark.parametrize("bad", [AFTER[:5], AFTER[:, :2], AFTER.T, AFTER[0]])
def test_measured_logits_of_another_shape(bad):
    with pytest.raises(ValueError, match=r"\(6, 3\); expected the logits of the same old samples.*Measure on"):
        forecast().compare(bad)


def test_measured_logits_that_are_not_finite():
    bad = AFTER.clone()
    bad[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"measured logits .* nan at \[3, 1\].*expected finite"):
        forecast().compare(bad)


@pytest.mark.parametrize("targets", [None, AFTER])
def test_accuracy_needs_labels(targets):
    with pytest.raises(ValueError, match=r"old targets.*; expected integer labels.*Give labels"):
        _ = forecast(targets=targets).accuracy


def test_a_class_incremental_pair_has_the_accuracy_that_was_measured():
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 16, generator=draw, dtype=DOUBLE)

    def task(low, high):
        y = torch.randint(low, high, (200,), generator=draw)
        return SimpleNamespace(phi=centres[y] + 0.4 * torch.randn(200, 16, generator=draw, dtype=DOUBLE), y=y)

    old, new = task(0, 5), task(5, 10)
    first = fc.GradientDescent(learning_rate=1.0, steps=200)
    head = train(old.phi, old.y, fc.LinearHead.zeros(16, 10, dtype=DOUBLE), first)
    second = fc.GradientDescent(learning_rate=1.0, steps=40)
    result = fc.forecast_linear(fc.Features(old.phi, old.y), fc.Features(new.phi, new.y), head, second)
    calibration = result.compare(train(new.phi, new.y, head, second).logits(old.phi))
    assert 0.05 < calibration.measured_accuracy < result.accuracy_before - 0.1
    assert calibration.accuracy_error == 0
    assert calibration.broken_precision == calibration.broken_recall == 1
