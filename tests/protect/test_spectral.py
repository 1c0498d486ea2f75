"""The spectral regulariser: its three forms agree, its limits hold, and it protects what it says."""

import pytest
import torch
from sklearn.datasets import load_digits

import forgetcast as fc
from builders import features, head, labels, relative_error, train


def setting(rows=60, width=12, outputs=4):
    old = features(rows, width, decay=1.2, seed=1)
    return old, features(50, width, seed=2), labels(50, 2, outputs), head(width, outputs)


def dense(phi):
    return torch.cat([phi, torch.ones_like(phi[:, :1])], 1)


@pytest.mark.parametrize("modes", [1, 4, 13])
def test_probe_form_equals_data_free_form(modes):
    old, _, _, start = setting()
    other = head(12, 4, seed=9)
    anchor = fc.SpectralAnchor.of(fc.Features(old), start, modes)
    probe = fc.SpectralProbe.of(fc.Features(old), start, modes)
    left, values, _ = torch.linalg.svd(dense(old), full_matrices=False)
    oracle = 10 / (modes * 4) * (left[:, :modes].T @ (other.logits(old) - start.logits(old))).square().sum()
    assert anchor.penalty(10.0).value(other.stacked()) == pytest.approx(float(oracle), rel=1e-9)
    assert float(probe.loss(other.logits(old), 10.0)) == pytest.approx(float(oracle), rel=1e-9)
    weight = other.stacked().requires_grad_()
    (probe.loss(dense(old) @ weight, 10.0)).backward()
    assert relative_error(anchor.penalty(10.0).gradient(other.stacked()), weight.grad) <= 1e-9


def test_closed_form_of_the_theory():
    old, phi, y, start = setting()
    anchor = fc.SpectralAnchor.of(fc.Features(old), start, 3)
    forecast = fc.forecast_linear(
        fc.Features(old), fc.Features(phi, y), start, fc.Ridge(0.2), penalty=anchor.penalty(5.0)
    )
    X, S = dense(phi), anchor.root
    residual = X @ start.stacked() - torch.nn.functional.one_hot(y, 4).double()
    left = X.T @ X + 0.2 * torch.eye(13).double() + 2 * 5.0 / 12 * S.T @ S
    assert relative_error(forecast.change, -torch.linalg.solve(left, X.T @ residual)) <= 1e-10


def test_no_mode_is_no_penalty():
    old, phi, y, start = setting()
    none = fc.SpectralAnchor.of(fc.Features(old), start, 0).penalty(5.0)
    given = fc.Features(old), fc.Features(phi, y), start, fc.Ridge(0.2)
    assert relative_error(fc.forecast_linear(*given, penalty=none).drift, fc.forecast_linear(*given).drift) <= 1e-12


def test_all_modes_are_joint_ridge_toward_the_reference():
    """2 mu / k = 1 with every mode: as if the old samples were there, with the old outputs as their targets."""
    old, phi, y, start = setting()
    anchor = fc.SpectralAnchor.of(fc.Features(old), start, 13)
    penalty = anchor.penalty(13 * 4 / 2)
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, fc.Ridge(0.2), penalty=penalty)
    targets = torch.cat([torch.nn.functional.one_hot(y, 4).double(), start.logits(old)])
    joint = fc.forecast_linear(fc.Features(old), fc.Features(torch.cat([phi, old]), targets), start, fc.Ridge(0.2))
    assert relative_error(forecast.drift, joint.drift) <= 1e-9


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("classes", [None, (2, 3)])
def test_penalised_training_is_forecast(loss, classes):
    old, phi, y, start = setting()
    penalty = fc.SpectralAnchor.of(fc.Features(old), head(12, 4, seed=5), 3).penalty(2.0)
    training = fc.GradientDescent(0.05, 40, momentum=0.5, weight_decay=0.01, loss=loss, classes=classes)
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, training, penalty=penalty)

    def extra(module):
        weight = torch.cat([module.weight.T, module.bias[None]])
        return 0.5 * (penalty.root @ weight - penalty.target).square().sum()

    after = train(phi, y, start, training, extra=extra)
    assert relative_error(forecast.drift, after.logits(old) - start.logits(old)) <= 1e-9


@pytest.mark.parametrize("modes", [3, 5])
@pytest.mark.parametrize("training", [fc.Ridge(1.0), fc.GradientFlow(200.0)], ids=["ridge", "flow"])
def test_vulnerable_drift_falls_and_the_rest_stays(modes, training):
    """FT6 on real digits: at least 10 times less drift in the held modes, the complement within a factor of 2."""
    pixels, digits = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    early, late = digits < 5, digits >= 5
    old, new = (fc.Features(pixels[part] / 16, digits[part]) for part in (early, late))
    zeros = fc.LinearHead.zeros(64, 10, dtype=torch.float64)
    start = fc.forecast_linear(old, old, zeros, fc.Ridge(1.0)).head_after
    penalty = fc.SpectralAnchor.of(old, start, modes).penalty(10.0)
    plain = fc.forecast_linear(old, new, start, training)
    held = fc.forecast_linear(old, new, start, training, penalty=penalty)
    before, after = plain.modes(65).energy, held.modes(65).energy
    assert float(before[:modes].sum() / after[:modes].sum()) >= 10
    assert 0.5 <= float(before[modes:].sum() / after[modes:].sum()) <= 2
    assert plain.accuracy < 0.1 < 0.5 < held.accuracy


def test_many_anchors_in_bounded_memory():
    anchors = [fc.SpectralAnchor.of(fc.Features(features(40, 9, seed=s)), head(9, 3, seed=s), 6) for s in range(8)]
    penalties = [anchor.penalty(1.0 + index) for index, anchor in enumerate(anchors)]
    combined = fc.combined_penalty(penalties)
    assert len(combined.root) <= 10
    for seed in (20, 21):
        weight = head(9, 3, seed=seed).stacked()
        assert combined.value(weight) == pytest.approx(sum(p.value(weight) for p in penalties), rel=1e-10)
        truth = sum(p.gradient(weight) for p in penalties)
        assert relative_error(combined.gradient(weight), truth) <= 1e-10
    rough = fc.combined_penalty(penalties, most_rows=4)
    assert len(rough.root) == 4
    error = [relative_error(fc.combined_penalty(penalties, r).hessian(), combined.hessian()) for r in (2, 5, 8)]
    assert error == sorted(error, reverse=True)


def test_growing_holds_new_outputs_at_zero():
    old, _, _, start = setting()
    anchor = fc.SpectralAnchor.of(fc.Features(old), start, 3).grow(6)
    assert anchor.penalty(1.0).value(start.grow(6).stacked()) == pytest.approx(0, abs=1e-20)
    bad = head(12, 5)
    with pytest.raises(ValueError, match=r"a penalty on weights of shape \(13, 6\).*equal shapes"):
        fc.forecast_linear(
            fc.Features(old), fc.Features(old, labels(60, 0, 5)), bad, fc.Ridge(1.0), penalty=anchor.penalty(1.0)
        )
    with pytest.raises(ValueError, match="all of equal shape"):
        fc.combined_penalty([anchor.penalty(1.0), fc.SpectralAnchor.of(fc.Features(old), start, 3).penalty(1.0)])
