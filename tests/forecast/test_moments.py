"""The moments-only forecast equals the mean over samples of the full one."""

import pytest
import torch

import forgetcast as fc
from builders import features, head, labels


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [fc.GradientDescent(0.1, 30), fc.Ridge(0.3), fc.AdamW(0.01, 20, batch_size=8)])
def test_moments_equal_samples(training, bias):
    phi, y, start = features(50, 7, seed=2), labels(50, 0, 3), head(7, 5, bias=bias)
    new = fc.Features(features(40, 7, seed=3), labels(40, 3, 5))
    full = fc.forecast_linear(fc.Features(phi, y), new, start, training)
    moments = fc.forecast_moments(fc.Moments.of(fc.Features(phi, y), 3), new, start, training)
    assert moments.mean_squared_drift == pytest.approx(full.mean_squared_drift, rel=1e-10)
    target = torch.nn.functional.one_hot(y, 5).double()
    before = float((full.logits_before - target).square().mean())
    after = float((full.logits - target).square().mean())
    assert moments.squared_error_before == pytest.approx(before, rel=1e-10)
    assert moments.squared_error_change == pytest.approx(after - before, rel=1e-8)
    assert torch.allclose(moments.output_drift, full.drift.square().mean(0), rtol=1e-9)
    assert torch.allclose(moments.modes(4).energy, full.modes(4).energy, rtol=1e-6)
    assert moments.vulnerable_rank().sample_modes == full.vulnerable_rank().sample_modes


def test_shards_add_up():
    phi, y = features(60, 5), labels(60, 0, 3)
    whole = fc.Moments.of(fc.Features(phi, y), 3)
    parts = fc.Moments.of(fc.Features(phi[:21], y[:21]), 3) + fc.Moments.of(fc.Features(phi[21:], y[21:]), 3)
    assert parts.rows == whole.rows
    assert torch.allclose(parts.gram, whole.gram, rtol=1e-12)
    assert torch.allclose(parts.cross, whole.cross, rtol=1e-12)


def test_foreign_moments_are_refused():
    moments = fc.Moments.of(fc.Features(features(60, 5), labels(60, 0, 3)), 3)
    new = fc.Features(features(40, 7, seed=3), labels(40, 3, 5))
    with pytest.raises(ValueError, match=r"width 5 and 3 outputs.*\(7, 5\).*expected equal widths"):
        fc.forecast_moments(moments, new, head(7, 5), fc.Ridge(1.0))
    with pytest.raises(ValueError, match="expected equal widths and outputs"):
        moments + fc.Moments.of(new, 5)


@pytest.mark.parametrize("training", [fc.GradientDescent(0.1, 30), fc.GradientDescent(0.1, 30, loss="cross_entropy")])
def test_many_steps_at_once(training):
    phi, y, start = features(50, 7, seed=2), labels(50, 0, 3), head(7, 5)
    new = fc.Features(features(40, 7, seed=3), labels(40, 3, 5))
    full = fc.forecast_linear(fc.Features(phi, y), new, start, training).at(steps=[30, 0, 7])
    moments = fc.forecast_moments(fc.Moments.of(fc.Features(phi, y), 3), new, start, training).at(steps=[30, 0, 7])
    drifts = [each.mean_squared_drift for each in moments]
    assert drifts == pytest.approx(full.mean_squared_drift.tolist(), rel=1e-10)
    assert moments[1].squared_error_change == pytest.approx(0, abs=1e-12)
    assert [each.settings["training"]["steps"] for each in moments] == [30, 0, 7]
    with pytest.raises(ValueError, match="expected values of 'steps'"):
        moments[0].at(time=[1.0])
