"""Many values of the dial at once equal separate forecasts."""

from dataclasses import replace

import pytest
import torch

import forgetcast as fc
from builders import features, head, labels, relative_error

RATES = [0.2 - i / 200 for i in range(30)]
TRAININGS = {
    "descent": (fc.GradientDescent(learning_rate=0.2, steps=30, weight_decay=0.1, drift_penalty=0.1), 40),
    "momentum": (fc.GradientDescent(learning_rate=0.1, steps=30, momentum=0.9, nesterov=True), 40),
    "cross-entropy": (fc.GradientDescent(learning_rate=0.5, steps=30, momentum=0.9, loss="cross_entropy"), 40),
    "cross-entropy, dual": (fc.GradientDescent(learning_rate=0.5, steps=30, loss="cross_entropy"), 6),
    "AdamW": (fc.AdamW(learning_rate=0.01, steps=30, batch_size=16), 40),
    "SGD": (fc.SGD(learning_rate=0.1, steps=30, batch_size=7, momentum=0.9), 40),
    "flow": (fc.GradientFlow(time=5.0, weight_decay=0.1), 40),
    "ridge": (fc.Ridge(penalty=1.0), 6),
    "ridge toward zero": (fc.Ridge(penalty=1.0, toward="zero"), 40),
}
VALUES = {"steps": [30, 0, 7, 45, 7, 1], "time": [3.0, 0.0, 50.0, 3.0], "penalty": [2.0, 0.5, 2.0, 100.0]}


def forecast(training, rows=40):
    old, new = (
        fc.Features(features(25, 9, seed=1), labels(25, 0, 2)),
        fc.Features(features(rows, 9), labels(rows, 2, 4)),
    )
    return fc.forecast_linear(old, new, head(9, 4), training)


@pytest.mark.parametrize("name", TRAININGS)
def test_every_point_equals_its_own_forecast(name):
    training, rows = TRAININGS[name]
    values = VALUES[training.dial]
    path = forecast(training, rows).at(**{training.dial: values})
    alone = [forecast(replace(training, **{training.dial: value}), rows) for value in values]
    assert path.values == tuple(values)
    assert len(path) == len(values)
    for i, single in enumerate(alone):
        assert float((path[i].drift - single.drift).norm()) <= 1e-11 * float(single.drift.norm()) + 1e-14
        assert path[i].settings["training"][training.dial] == values[i]
        assert relative_error(path[i].head_after.weight, single.head_after.weight) <= 1e-11
    truth = torch.tensor([single.mean_squared_drift for single in alone], dtype=torch.float64)
    torch.testing.assert_close(path.mean_squared_drift, truth, rtol=1e-9, atol=1e-14)
    assert path.accuracy.tolist() == pytest.approx([single.accuracy for single in alone])


def test_accuracy_of_many_blocks_in_single_precision():
    phi, y = features(3000, 9, seed=1, dtype=torch.float32), labels(3000, 0, 4)
    new = fc.Features(features(40, 9, dtype=torch.float32), labels(40, 2, 4))
    training = fc.GradientDescent(learning_rate=0.2, steps=300)
    path = fc.forecast_linear(fc.Features(phi, y, block_rows=1300), new, head(9, 4, dtype=torch.float32), training)
    path = path.at(steps=list(range(0, 300, 20)))
    truth = [path[i].accuracy for i in range(len(path))]
    assert len(set(truth)) > 5
    assert path.accuracy.tolist() == pytest.approx(truth, abs=1 / 3000)  # one near tie may fall either way


def test_equal_outputs_count_as_argmax_counts_them():
    old, new = fc.Features(features(25, 9, seed=1), labels(25, 0, 4)), fc.Features(features(9, 9), labels(9, 2, 4))
    start = fc.LinearHead.zeros(9, 4, dtype=torch.float64)
    path = fc.forecast_linear(old, new, start, fc.GradientDescent(learning_rate=0.1, steps=1)).at(steps=[0])
    assert path.accuracy.item() == path[0].accuracy == float((labels(25, 0, 4) == 0).double().mean())


@pytest.mark.parametrize("name", TRAININGS)
def test_a_dial_that_the_training_does_not_have(name):
    training, rows = TRAININGS[name]
    wrong = {"steps": "time", "time": "penalty", "penalty": "steps"}[training.dial]
    result = forecast(training, rows)
    for given in ({wrong: [1]}, {}, {wrong: [1], training.dial: [1]}):
        with pytest.raises(ValueError, match=rf"expected values of '{training.dial}'.*Call at\({training.dial}="):
            result.at(**given)


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_steps_that_are_not_counts(unchecked_types, value):
    with pytest.raises(ValueError, match=rf"got steps={value}; expected an integer of at least 0. Correct steps"):
        forecast(TRAININGS["descent"][0]).at(steps=[1, value])


def test_negative_time():
    with pytest.raises(ValueError, match=r"got time=-1.0; expected a finite number"):
        forecast(TRAININGS["flow"][0]).at(time=[-1.0])


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_a_schedule_ends(loss):
    result = forecast(fc.GradientDescent(learning_rate=RATES, steps=30, loss=loss))
    assert relative_error(result.at(steps=[30])[0].drift, result.drift) <= 1e-12
    with pytest.raises(ValueError, match=r"got steps=31; expected at most 30. The schedule ends there: extend it"):
        result.at(steps=[3, 31])


@pytest.mark.parametrize("kind", [fc.SGD, fc.AdamW])
def test_an_order_ends(kind):
    result = forecast(kind(learning_rate=0.01, steps=3, order=[[0, 1], [2], [5, 3]]))
    assert torch.equal(result.at(steps=[3])[0].drift, result.drift)
    with pytest.raises(ValueError, match=r"got steps=4; expected at most 3. The order ends there: extend it"):
        result.at(steps=[4])
