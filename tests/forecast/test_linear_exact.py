"""Bar 1: the forecast of a linear head equals really running the optimiser, for every training and awkward shape."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import forgetcast as fc
from builders import features, head, labels, measured_drift, relative_error, train

TRAININGS = {
    "descent": {},
    "descent, sum": {"reduction": "sum"},
    "heavy ball": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "weight decay": {"weight_decay": 0.05},
    "drift penalty": {"drift_penalty": 0.1},
    "all at once": {"momentum": 0.7, "weight_decay": 0.02, "drift_penalty": 0.03, "reduction": "sum"},
    "schedule": {"learning_rate": "schedule", "momentum": 0.5},
    "some outputs": {"classes": "new", "weight_decay": 0.02, "drift_penalty": 0.03},
}
# n_new, d, C, what is awkward about them
SHAPES = [
    (5, 3, 2, None),
    (7, 40, 3, "fewer samples than features"),
    (200, 30, 4, "rank-deficient"),
    (60, 60, 5, "duplicated"),
    (50, 12, 6, "one class"),
    (12, 90, 120, "fewer samples than features"),
    (1, 6, 3, "one sample"),
]


def new_task(rows: int, width: int, outputs: int, awkward: str | None, dtype=torch.float64):
    phi = features(rows, width, decay=0.7, seed=rows, dtype=dtype)
    y = labels(rows, outputs // 2, outputs, seed=rows)
    if awkward == "rank-deficient":
        phi[:, width // 2 :] = phi[:, : width - width // 2]
    if awkward == "duplicated":
        phi[rows // 2 :], y[rows // 2 :] = phi[: rows - rows // 2].clone(), y[: rows - rows // 2].clone()
    if awkward == "one class":
        y[:] = outputs - 1
    return phi, y


def stable_rate(phi, training, outputs, loss) -> float:
    """A rate at 0.9 of the squared loss's limit (half of it is kept for decay and penalties)."""
    extended = torch.cat([phi, torch.ones_like(phi[:, :1])], 1)
    seen = outputs - outputs // 2 if training.get("classes") else outputs
    scale = 2.0 if training.get("reduction") == "sum" else 2.0 / (len(phi) * seen)
    if loss == "cross_entropy":
        scale = 0.5 if training.get("reduction") == "sum" else 0.5 / len(phi)
    largest = float(torch.linalg.matrix_norm(extended.double(), 2)) ** 2 * scale
    largest += training.get("weight_decay", 0) + training.get("drift_penalty", 0)
    return 0.5 / largest if training.get("nesterov") else 1.8 / largest


def build(name: str, phi, outputs: int, loss: str, steps: int) -> fc.GradientDescent:
    options = dict(TRAININGS[name])
    rate = stable_rate(phi, options, outputs, loss)
    if options.pop("learning_rate", None):
        rate = [rate * (1 - step / (2 * steps)) for step in range(steps)]
    if options.pop("classes", None):
        options["classes"] = tuple(range(outputs // 2, outputs))
    return fc.GradientDescent(learning_rate=rate, steps=steps, loss=loss, **options)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[:3]} {shape[3] or ''}")
def test_forecast_equals_the_optimiser(shape, name, loss):
    rows, width, outputs, awkward = shape
    phi, y = new_task(rows, width, outputs, awkward)
    old = features(33, width, decay=0.5, seed=1)
    start = head(width, outputs, bias=rows % 2 == 1)
    training = build(name, phi, outputs, loss, steps=40)
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, training)
    truth = measured_drift(old, start, train(phi, y, start, training))
    assert relative_error(forecast.drift, truth) <= 1e-9
    assert float(truth.norm()) > 0


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize(("rows", "width", "outputs"), [(5000, 300, 20), (400, 900, 12), (1500, 900, 120)])
def test_large_shapes(rows, width, outputs, loss):
    phi, y = new_task(rows, width, outputs, None)
    old = features(50, width, seed=1)
    start = head(width, outputs)
    training = build("all at once", phi, outputs, loss, steps=8)
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, training)
    assert relative_error(forecast.drift, measured_drift(old, start, train(phi, y, start, training))) <= 1e-9


@settings(max_examples=60)
@given(
    rows=st.integers(2, 40),
    width=st.integers(3, 30),
    outputs=st.integers(2, 8),
    momentum=st.sampled_from([0.0, 0.5, 0.95]),
    decay=st.sampled_from([0.0, 0.3]),
    penalty=st.sampled_from([0.0, 0.2]),
    loss=st.sampled_from(["squared", "cross_entropy"]),
    reduction=st.sampled_from(["mean", "sum"]),
    bias=st.booleans(),
    share=st.floats(0.05, 0.95),
    steps=st.integers(0, 80),
    seed=st.integers(0, 10**6),
)
def test_forecast_equals_the_optimiser_anywhere(
    rows, width, outputs, momentum, decay, penalty, loss, reduction, bias, share, steps, seed
):
    phi, y = features(rows, width, seed=seed), labels(rows, 0, outputs, seed)
    old, start = features(9, width, seed=seed + 1), head(width, outputs, bias=bias, seed=seed)
    options = {"momentum": momentum, "weight_decay": decay, "drift_penalty": penalty, "reduction": reduction}
    rate = share * stable_rate(phi, options, outputs, loss)
    training = fc.GradientDescent(learning_rate=rate, steps=steps, loss=loss, **options)
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, training)
    truth = measured_drift(old, start, train(phi, y, start, training))
    assert float((forecast.drift - truth).norm()) <= 1e-9 * float(truth.norm()) + 1e-13


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize(("rows", "width"), [(500, 40), (30, 64)])
def test_float32_direction(rows, width, loss):
    phi, y = new_task(rows, width, 6, None, torch.float32)
    old, start = features(80, width, seed=1, dtype=torch.float32), head(width, 6, dtype=torch.float32)
    training = build("heavy ball", phi, 6, loss, steps=200)
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, training)
    after = train(phi, y, start, training)
    calibration = forecast.compare(after.logits(old))
    assert forecast.drift.dtype == torch.float32
    assert calibration.one_minus_cosine <= 1e-6


def test_unstable_side_of_one():
    """Rates with learning_rate * s between 1 and 2 oscillate; log1p would be NaN there."""
    phi, y = features(20, 4, decay=0.1, seed=3), labels(20, 0, 2)
    start, old = head(4, 2), features(5, 4, seed=4)
    rate = 1.06 * stable_rate(phi, {}, 2, "squared")
    training = fc.GradientDescent(learning_rate=rate, steps=41)
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, training)
    assert relative_error(forecast.drift, measured_drift(old, start, train(phi, y, start, training))) <= 1e-9


@pytest.mark.parametrize("optimizer", [fc.SGD, fc.AdamW])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_minibatches_are_replayed(optimizer, loss):
    phi, y = features(70, 10, seed=5), labels(70, 0, 4)
    start, old = head(10, 4), features(20, 10, seed=6)
    extra = {"momentum": 0.9} if optimizer is fc.SGD else {}
    training = optimizer(learning_rate=0.01, steps=50, batch_size=16, weight_decay=0.1, loss=loss, seed=3, **extra)
    sampler = torch.utils.data.RandomSampler(range(70), generator=torch.Generator().manual_seed(3))
    epochs = itertools.chain.from_iterable(torch.utils.data.BatchSampler(sampler, 16, False) for _ in range(10))
    order = list(itertools.islice(epochs, 50))
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, training)
    truth = measured_drift(old, start, train(phi, y, start, training, order))
    assert relative_error(forecast.drift, truth) <= 1e-9
    given_order = optimizer(learning_rate=0.01, steps=50, weight_decay=0.1, loss=loss, order=order, **extra)
    again = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, given_order)
    assert torch.equal(again.drift, forecast.drift)


def test_a_full_batch_of_sgd_is_gradient_descent():
    phi, y = features(40, 6, seed=5), labels(40, 0, 3)
    start, old = head(6, 3), features(20, 6, seed=6)
    options = {"learning_rate": 0.05, "steps": 30, "momentum": 0.9, "loss": "squared"}
    closed = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, fc.GradientDescent(**options))
    replay = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, fc.SGD(batch_size=40, **options))
    assert relative_error(closed.drift, replay.drift) <= 1e-10


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_soft_targets(loss):
    phi = features(40, 6, seed=5)
    y = torch.softmax(features(40, 3, seed=8), 1)
    start, old = head(6, 3), features(20, 6, seed=6)
    training = fc.GradientDescent(learning_rate=0.05, steps=30, loss=loss)
    forecast = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, training)
    assert relative_error(forecast.drift, measured_drift(old, start, train(phi, y, start, training))) <= 1e-9


def test_nothing_to_learn_moves_nothing():
    """New data that the head answers exactly has no residual, so no drift."""
    phi, start, old = features(40, 6, seed=5), head(6, 3), features(20, 6, seed=6)
    new = fc.Features(phi, start.logits(phi))
    forecast = fc.forecast_linear(fc.Features(old), new, start, fc.GradientDescent(learning_rate=0.1, steps=1000))
    assert float(forecast.drift.abs().max()) <= 1e-13


def test_order_of_samples_only_permutes_rows():
    phi, y, start, old = features(40, 6, seed=5), labels(40, 0, 3), head(6, 3), features(20, 6, seed=6)
    training = fc.GradientDescent(learning_rate=0.1, steps=10)
    plain = fc.forecast_linear(fc.Features(old), fc.Features(phi, y), start, training).drift
    new, turn = torch.randperm(40), torch.randperm(20)
    turned = fc.forecast_linear(fc.Features(old[turn]), fc.Features(phi[new], y[new]), start, training).drift
    assert relative_error(turned, plain[turn]) <= 1e-12
