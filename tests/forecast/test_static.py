"""The frozen-tangent forecast of networks: against the linear forecast, dense Jacobians and simulated training."""

from dataclasses import replace

import pytest
import torch
from static_networks import CLASSES, NETWORKS, network, outputs_of
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

import forgetcast as fc
from builders import DOUBLE, dense_jacobian, relative_error
from forgetcast.forecast.displacement import closed_displacement
from forgetcast.forecast.static import static_drift
from forgetcast.tangent.jacobian import trainable
from forgetcast.tangent.products import TangentMatrix

SQUARED = [
    fc.GradientDescent(0.05, 60),
    fc.GradientDescent(0.02, 60, momentum=0.8, weight_decay=0.1),
    fc.GradientDescent(0.02, 40, momentum=0.5, nesterov=True, drift_penalty=0.3, classes=(2, 3)),
    fc.GradientDescent([0.05, 0.01] * 10, 20, weight_decay=0.2, classes=(2, 3)),
    fc.GradientFlow(3.0, drift_penalty=0.2),
    fc.GradientFlow(2.0, weight_decay=0.5, reduction="sum"),
    fc.Ridge(0.3),
    fc.Ridge(0.3, toward="zero"),
    fc.Ridge(0.0),
]
SIMULATED = [
    fc.GradientDescent(0.1, 40, loss="cross_entropy", momentum=0.5, drift_penalty=0.1),
    fc.GradientDescent([0.1, 0.3] * 10, 20, loss="cross_entropy", classes=(2, 3), reduction="sum"),
    fc.SGD(0.1, 25, batch_size=5, momentum=0.9, weight_decay=0.01),
    fc.SGD(0.02, 25, batch_size=5, loss="squared", classes=(2, 3)),
    fc.AdamW(0.01, 25, batch_size=5, weight_decay=0.1),
]


def flat(model):
    return torch.cat([values.detach().flatten() for values in trainable(model).values()])


def dense_displacement(J, residual, theta, training):
    """The filter on a dense eigen-decomposition of the Hessian."""
    scale = training.data_weight * (2 if training.reduction == "sum" else 2 / residual.numel())
    s, V = torch.linalg.eigh(J.T @ J)
    s = torch.where(s > 1e-12 * s[-1], s, 0.0)
    dial = getattr(training, training.dial)
    phi = training.filter(scale * s + training.weight_decay + training.drift_penalty, dial)
    slope = scale * J.T @ residual.flatten() + training.decay(dial) * theta
    return -V @ (phi * (V.T @ slope))


def trained(J, value, y, theta, training):
    """Real optimisers on the linearised model, by autograd."""
    moving = theta.clone().requires_grad_()
    if isinstance(training, fc.AdamW):
        optimizer = torch.optim.AdamW(
            [moving], betas=training.betas, eps=training.epsilon, weight_decay=training.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(
            [moving], lr=1.0, momentum=training.momentum, weight_decay=training.weight_decay, nesterov=training.nesterov
        )
    seen = list(range(CLASSES)) if training.classes is None else list(training.classes)
    place = torch.zeros(CLASSES, dtype=torch.int64)
    place[seen] = torch.arange(len(seen))
    order = getattr(training, "order", None) or [range(len(y))] * training.steps
    for step in range(training.steps):
        rate = training.learning_rate
        optimizer.param_groups[0]["lr"] = rate if isinstance(rate, float) else rate[step]
        batch = torch.as_tensor(list(order[step]))
        logits = (value + (J @ (moving - theta)).view_as(value))[batch][:, seen]
        if training.loss == "squared":
            loss = mse_loss(logits, one_hot(y[batch], CLASSES)[:, seen].double(), reduction=training.reduction)
        else:
            loss = cross_entropy(logits, place[y[batch]], reduction=training.reduction)
        loss = loss + training.drift_penalty / 2 * (moving - theta).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (moving - theta).detach()


def ordered(training, count, seed=0):
    """The same training with the order of its minibatches written down."""
    if not hasattr(training, "order"):
        return training
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(count, generator=generator)[: training.batch_size].tolist() for _ in range(training.steps)]
    return replace(training, order=order)


@pytest.mark.parametrize("training", [*SQUARED, *SIMULATED])
@pytest.mark.parametrize("form", ["explicit", "matrix-free"])
def test_a_linear_head_on_a_frozen_body_is_the_linear_forecast(training, form):
    if form == "matrix-free" and isinstance(training, fc.SGD | fc.AdamW):
        pytest.skip("minibatches need the matrix")
    torch.manual_seed(1)
    body, head = (
        nn.Sequential(nn.Linear(5, 7), nn.Tanh()).double().requires_grad_(False),
        nn.Linear(7, CLASSES).double(),
    )
    old, new, y = torch.randn(20, 5, dtype=DOUBLE), torch.randn(12, 5, dtype=DOUBLE), torch.randint(2, CLASSES, (12,))
    exact = fc.forecast_linear(
        fc.Features(body(old)), fc.Features(body(new), y), fc.LinearHead.from_module(head), training
    )
    found = static_drift(nn.Sequential(body, head), old, new, y, training, form=form, tolerance=1e-12)
    assert relative_error(found.drift, exact.drift) < 1e-8
    torch.testing.assert_close(found.before, exact.logits_before)
    weight, bias = found.delta.split([7 * CLASSES, CLASSES])
    torch.testing.assert_close(torch.cat([weight.view(CLASSES, 7).T, bias[None]]), exact.change, rtol=1e-6, atol=1e-9)
    assert found.plan.form == found.cost.form == form
    assert found.names == ("1.weight", "1.bias")


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("training", SQUARED)
def test_squared_loss_is_the_dense_filter(name, training):
    model, old, new, y = network(name)
    seen = slice(None) if training.classes is None else list(training.classes)
    J_new = dense_jacobian(model, new, trainable(model))[0][:, seen].flatten(0, 1)
    J_old = dense_jacobian(model, old, trainable(model))[0]
    residual = (outputs_of(model, new) - one_hot(y, CLASSES))[:, seen]
    delta = dense_displacement(J_new, residual, flat(model), training)
    for form in ("explicit", "matrix-free"):
        found = static_drift(model, old, new, y, training, form=form, tolerance=1e-11)
        assert found.status in ("converged", "exact")
        assert relative_error(found.delta, delta) < 1e-6
        assert relative_error(found.drift, J_old @ delta) < 1e-6


@pytest.mark.parametrize("name", ["perceptron", "reader"])
@pytest.mark.parametrize("training", SIMULATED)
def test_other_trainings_are_the_linearised_model_trained(name, training):
    model, old, new, y = network(name)
    training = ordered(training, len(y))
    J, J_old = (dense_jacobian(model, x, trainable(model))[0].flatten(0, 1) for x in (new, old))
    delta = trained(J, outputs_of(model, new), y, flat(model), training)
    found = static_drift(model, old, new, y, training)
    assert (found.status, found.products) == ("simulated", training.steps)
    assert relative_error(found.delta, delta) < 1e-9
    assert relative_error(found.drift.flatten(), J_old @ delta) < 1e-9
    if not hasattr(training, "order"):
        free = static_drift(model, old, new, y, training, form="matrix-free")
        assert relative_error(free.delta, delta) < 1e-9


@pytest.mark.parametrize("training", SQUARED)
@pytest.mark.parametrize("name", ["perceptron", "small_head"])
def test_primal_is_dual(training, name):
    model, _, new, y = network(name)
    training = replace(training, classes=None)
    tangent = TangentMatrix(dense_jacobian(model, new, trainable(model))[0], outputs_of(model, new))
    residual = tangent.value() - one_hot(y, CLASSES)
    final = getattr(training, training.dial)
    sides = [
        closed_displacement(tangent, residual, flat(model), training, [final], tolerance=1e-11, side=side)
        for side in ("primal", "dual")
    ]
    assert [found.side for found in sides] == ["primal", "dual"]
    if training == fc.Ridge(0.0) and name == "small_head":
        return  # no exact fit exists: the dual has no solution to converge to
    assert relative_error(sides[0].deltas, sides[1].deltas) < 1e-6


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_small_steps_are_real_training(name):
    """The forecast's error is of second order: a tenth of the rate, a tenth of the relative error."""
    errors = []
    for rate in (1e-2, 1e-3):
        model, old, new, y = network(name)
        before = outputs_of(model, old)
        training = fc.GradientDescent(rate, 5)
        forecast = static_drift(model, old, new, y, training).drift
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
        for _ in range(5):
            optimizer.zero_grad()
            logits = model(**new)["logits"] if isinstance(new, dict) else model(new)
            mse_loss(logits, one_hot(y, CLASSES).double()).backward()
            optimizer.step()
        errors.append(relative_error(forecast, outputs_of(model, old) - before))
    assert errors[1] < max(0.2 * errors[0], 1e-9)  # exact already where only the head trains


@pytest.mark.parametrize("training", [SQUARED[1], SQUARED[4], SQUARED[7], SIMULATED[0]])
def test_several_dials_from_one_space(training):
    model, old, new, y = network("perceptron")
    dials = {"steps": [30, 0, 7], "time": [1.0, 0.0, 2.5], "penalty": [2.0, 0.5, 1.0]}[training.dial]
    found = static_drift(model, old, new, y, training, dials=dials, tolerance=1e-10)
    assert found.dials == (*dials, getattr(training, training.dial))
    for dial, drift in zip(found.dials, found.drifts, strict=True):
        schedule = {training.dial: dial}
        alone = static_drift(model, old, new, y, replace(training, **schedule), tolerance=1e-10)
        torch.testing.assert_close(drift, alone.drift, rtol=1e-7, atol=1e-9)
    if training.dial != "penalty":
        assert not found.drifts[1].any()


def test_nothing_to_learn_and_no_steps_move_nothing():
    model, old, new, _ = network("perceptron")
    fitted = outputs_of(model, new)
    found = static_drift(model, old, new, fitted, fc.GradientDescent(0.1, 50))
    assert not found.drift.any()
    assert found.products == 0
    idle = static_drift(model, old, new, torch.ones(9, dtype=torch.int64), fc.GradientFlow(0.0))
    assert not idle.drift.any()
    assert idle.products == 0


def test_tangents_that_do_not_overlap_forget_nothing():
    model, *_ = network("reader")
    old, new = {"tokens": torch.randint(0, 6, (5, 4))}, {"tokens": torch.randint(6, 12, (7, 4))}
    y = torch.randint(0, CLASSES, (7,))
    found = static_drift(model, old, new, y, fc.GradientFlow(5.0), ["embedding.weight"])
    assert float(found.delta.norm()) > 0.01
    assert not found.drift.any()


def test_order_of_samples_changes_nothing_but_rows():
    model, old, new, y = network("convolution")
    training, order, rows = fc.Ridge(0.1), torch.randperm(9), torch.randperm(6)
    straight = static_drift(model, old, new, y, training, tolerance=1e-12)
    shuffled = static_drift(model, old[rows], new[order], y[order], training, tolerance=1e-12, chunk=2)
    torch.testing.assert_close(shuffled.drift, straight.drift[rows])


def test_an_iteration_that_stops_early_says_so():
    model, old, new, y = network("perceptron")
    found = static_drift(model, old, new, y, fc.Ridge(1e-6), most=4)
    assert found.status == "stopped"
    assert found.residual > 1e-6
    assert found.products == 4


def test_an_unstable_rate_is_refused_with_the_largest_stable_one():
    model, old, new, y = network("perceptron")
    J = dense_jacobian(model, new, trainable(model))[0].flatten(0, 1)
    limit = 2 / (2 / 36 * float(torch.linalg.eigvalsh(J @ J.T)[-1]))
    with pytest.raises(ValueError, match=f"at most {limit:.4f}"):
        static_drift(model, old, new, y, fc.GradientDescent(1.1 * limit, 200))
    static_drift(model, old, new, y, fc.GradientDescent(0.99 * limit, 200))


def test_single_precision():
    model, old, new, y = network("perceptron")
    exact = static_drift(model, old, new, y, fc.GradientDescent(0.05, 60))
    found = static_drift(model.float(), old.float(), new.float(), y, fc.GradientDescent(0.05, 60))
    assert found.drift.dtype == torch.float32
    assert relative_error(found.drift, exact.drift) < 1e-5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "3 targets for 9 new samples"),
        ({"targets": torch.full((9,), 4)}, "label 4"),
        ({"training": fc.Ridge(0.1, classes=(2, 7))}, "outputs in 0 .. 3"),
        ({"training": fc.Ridge(0.1, classes=(0, 1))}, "not among the outputs"),
        ({"new": torch.full((9, 5), float("nan"), dtype=DOUBLE)}, "new outputs"),
        ({"old": torch.full((6, 5), float("inf"), dtype=DOUBLE).fill_(float("nan"))}, "old outputs"),
        ({"form": "explicit", "memory": 1e3}, "does not fit|fits"),
        ({"training": fc.SGD(0.1, 5), "form": "matrix-free"}, "minibatch"),
        ({"training": fc.SGD(0.1, 5), "memory": 1e3}, "Raise memory"),
        ({"dials": [-1.0]}, "penalty"),
        ({"parameters": ["nonesuch"]}, "nonesuch"),
    ],
)
def test_bad_input_is_refused(change, match):
    model, old, new, y = network("perceptron")
    given = {"old": old, "new": new, "targets": y, "training": fc.Ridge(0.1)} | change
    with pytest.raises(ValueError, match=match):
        static_drift(model, **given)


def test_an_unknown_form_is_refused(unchecked_types):
    model, old, new, y = network("perceptron")
    with pytest.raises(ValueError, match="matrix-free"):
        static_drift(model, old, new, y, fc.Ridge(0.1), form="matrix_free")
