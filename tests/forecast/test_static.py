"""The frozen-tangent forecast of networks: against the linear forecast, dense Jacobians and simulated training."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot, scaled_dot_product_attention

import forgetcast as fc
from builders import DOUBLE, dense_jacobian, relative_error
from forgetcast.forecast.displacement import closed_displacement
from forgetcast.forecast.network_modes import network_modes
from forgetcast.forecast.static import static_drift
from forgetcast.forecast.static_plan import expected_products, static_plan
from forgetcast.tangent.jacobian import trainable
from forgetcast.tangent.operator import TangentOperator
from forgetcast.tangent.products import TangentMatrix
from forgetcast.tangent.spectrum import kernel_overlap

CLASSES = 4
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


class Reader(nn.Module):
    """An embedding, fused attention and a head: inputs by name, logits by name."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(12, 8), nn.Linear(8, 24), nn.Linear(8, CLASSES)

    def forward(self, *, tokens):
        q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in self.mix(self.embedding(tokens)).chunk(3, -1))
        return {"logits": self.head(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))}


def perceptron():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    return model, torch.randn(6, 5, dtype=DOUBLE), torch.randn(9, 5, dtype=DOUBLE)


def convolution():
    layers = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(27, CLASSES)
    model = nn.Sequential(*layers).double()
    return model, torch.randn(6, 1, 4, 4, dtype=DOUBLE), torch.randn(9, 1, 4, 4, dtype=DOUBLE)


def reader():
    model = Reader().double()
    return model, {"tokens": torch.randint(0, 12, (6, 5))}, {"tokens": torch.randint(0, 12, (9, 5))}


def small_head():
    """Fewer parameters than samples x outputs."""
    model, old, new = perceptron()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model, old, new[:, :5].repeat(2, 1) + 0.1 * torch.randn(18, 5, dtype=DOUBLE)


NETWORKS = {make.__name__: make for make in (perceptron, convolution, reader, small_head)}


def network(name, seed=0):
    torch.manual_seed(seed)
    model, old, new = NETWORKS[name]()
    model.eval()
    count = len(new["tokens"] if isinstance(new, dict) else new)
    return model, old, new, torch.randint(2, CLASSES, (count,))


def outputs_of(model, inputs):
    with torch.no_grad():
        return model(**inputs)["logits"] if isinstance(inputs, dict) else model(inputs)


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


def test_the_plan_takes_the_cheaper_form_that_fits():
    sizes = {"element_bytes": 4, "graph_bytes": 10**6, "memory": 1e9}
    ridge = fc.Ridge(0.1)
    few = static_plan(ridge, 100, 10, 1000, **sizes)
    assert few.form == "explicit"
    assert few.explicit_passes < few.free_passes
    many = static_plan(ridge, 100, 1000, 2000, **sizes)
    assert many.form == "matrix-free"
    assert many.explicit_passes > many.free_passes
    wide = static_plan(ridge, 100, 10, 10**7, **sizes)
    assert wide.form == "matrix-free"
    assert "memory" in wide.reason
    tight = static_plan(ridge, 100, 400, 1000, **(sizes | {"graph_bytes": 10**10}))
    assert tight.free_passes > static_plan(ridge, 100, 400, 1000, **sizes).free_passes
    assert static_plan(fc.SGD(0.1, 5), 100, 1000, 2000, **sizes).form == "explicit"


@pytest.mark.parametrize("steps", [3, 30, 300])
def test_expected_products_are_an_upper_bound_for_stable_descent(steps):
    model, old, new, y = network("convolution")
    J = dense_jacobian(model, new, trainable(model))[0].flatten(0, 1)
    limit = 2 / (2 / 36 * float(torch.linalg.eigvalsh(J @ J.T)[-1]))
    training = fc.GradientDescent(0.9 * limit, steps)
    found = static_drift(model, old, new, y, training)
    assert found.products <= expected_products(training, 36) + 1


def test_network_modes_are_the_dense_ones():
    model, old, new, y = network("reader")
    delta = static_drift(model, old, new, y, fc.GradientFlow(2.0)).delta
    J = dense_jacobian(model, old, trainable(model))[0].flatten(0, 1)
    values, vectors = torch.linalg.eigh(J @ J.T)
    energies = (vectors.T @ (J @ delta)).square().flip(0)
    for tangent in (
        TangentOperator(model, old, trainable(model)),
        TangentMatrix(J.view(6, 4, -1), outputs_of(model, old)),
    ):
        modes = network_modes(tangent, delta, 5)
        assert modes.found.converged
        torch.testing.assert_close(modes.eigenvalues, values.flip(0)[:5], rtol=1e-7, atol=0)
        torch.testing.assert_close(modes.energy, energies[:5], rtol=1e-3, atol=1e-4 * float(energies.sum()))
        assert modes.total_energy == pytest.approx(float(energies.sum()))
        torch.testing.assert_close(modes.energy_of((J @ delta).view(6, 4)), modes.energy)
        bounds = modes.certificate
        assert bounds.tail == pytest.approx(float(energies[5:].sum()), rel=1e-3)
        assert bounds.tail <= bounds.projected_bound <= bounds.total_bound
        outside = delta - J.T @ (vectors[:, -5:] / values[-5:] @ (vectors[:, -5:].T @ (J @ delta)))
        assert bounds.projected_bound == pytest.approx(float(values[-6] * outside.square().sum()), rel=1e-3)
        share = energies.cumsum(0) / energies.sum()
        fewest = int((share < 0.5).sum()) + 1
        assert modes.vulnerable_rank(0.5) == (fewest if fewest <= 5 else None)
    every = network_modes(tangent, delta, 100)
    assert len(every.eigenvalues) == 24
    assert every.vulnerable_rank(1.0) is not None
    assert every.certificate.total_bound == 0.0
    assert network_modes(tangent, delta, 10).found.products > 0
    assert network_modes(tangent, 0 * delta, 3).vulnerable_rank() == 0


def test_unconverged_modes_certify_nothing():
    model, old, new, y = network("reader")
    delta = static_drift(model, old, new, y, fc.GradientFlow(2.0)).delta
    stopped = network_modes(TangentOperator(model, old, trainable(model)), delta, 5, most=6)
    assert not stopped.found.converged
    assert stopped.certificate.total_bound == float("inf")


def test_network_modes_of_a_linear_head_are_those_of_its_features():
    torch.manual_seed(2)
    head = nn.Linear(7, CLASSES).double()
    old, new, y = torch.randn(20, 7, dtype=DOUBLE), torch.randn(12, 7, dtype=DOUBLE), torch.randint(2, CLASSES, (12,))
    training = fc.GradientFlow(3.0)
    linear = fc.forecast_linear(fc.Features(old), fc.Features(new, y), fc.LinearHead.from_module(head), training).modes(
        3
    )
    delta = static_drift(head, old, new, y, training, tolerance=1e-12).delta
    modes = network_modes(TangentOperator(head, old, trainable(head)), delta, 3 * CLASSES, tolerance=1e-8)
    torch.testing.assert_close(modes.eigenvalues, linear.eigenvalues.repeat_interleave(CLASSES), rtol=1e-9, atol=0)
    torch.testing.assert_close(modes.energy.view(3, CLASSES).sum(1), linear.energy, rtol=1e-6, atol=1e-9)


def test_overlap_from_kernel_blocks_is_that_of_the_tangent_spaces():
    model, old, new, y = network("perceptron")
    J_o, J_n = (dense_jacobian(model, x, trainable(model))[0].flatten(0, 1) for x in (old, new[:4]))
    found = kernel_overlap(J_o @ J_o.T, J_o @ J_n.T, J_n @ J_n.T)
    V_o, V_n = (torch.linalg.svd(J, full_matrices=False).Vh for J in (J_o, J_n))
    torch.testing.assert_close(found.cosines, torch.linalg.svdvals(V_o @ V_n.T), rtol=1e-6, atol=1e-6)
    assert found.energy_weighted == pytest.approx(
        float((J_o @ J_n.T).square().sum() / (J_o @ J_o.T).norm() / (J_n @ J_n.T).norm())
    )
    apart = kernel_overlap(torch.eye(3), torch.zeros(3, 2), torch.eye(2))
    assert float(apart.cosines.max()) == apart.mean_square == apart.energy_weighted == 0.0
    same = kernel_overlap(J_o @ J_o.T, J_o @ J_o.T, J_o @ J_o.T)
    torch.testing.assert_close(same.cosines, torch.ones_like(same.cosines))


def test_forgetting_through_the_overlap_is_the_forecast():
    """Doan's form of the ridge forecast: - U_o S_o O S_n (S_n^2 + penalty)^-1 U_n^T r."""
    model, old, new, y = network("perceptron")
    J_o, J_n = (dense_jacobian(model, x, trainable(model))[0].flatten(0, 1) for x in (old, new))
    (U_o, S_o, V_o), (U_n, S_n, V_n) = (torch.linalg.svd(J, full_matrices=False) for J in (J_o, J_n))
    r = (outputs_of(model, new) - one_hot(y, CLASSES)).flatten()
    drift = -(U_o * S_o) @ (V_o @ V_n.T) @ (S_n / (S_n**2 + 0.2) * (U_n.T @ r))
    found = static_drift(model, old, new, y, fc.Ridge(0.2), tolerance=1e-12)
    assert relative_error(found.drift.flatten(), drift) < 1e-9
