"""What does not fit is refused in words: what was given, what was expected, and what to do."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import forgetcast as fc

TRAINING = fc.AdamW(1e-3, 8, batch_size=5)


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
    return model, (torch.randn(8, 6), torch.arange(8) % 2), (torch.randn(12, 6), 2 + torch.arange(12) % 3)


def refused(message, *, model=None, old=None, new=None, training=TRAINING, **settings):
    given = task()
    model, old, new = (own if other is None else other for own, other in zip(given, (model, old, new), strict=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        fc.forecast(model, old, new, training, **({"budget": 1.0} | settings))
    assert "; expected " in str(caught.value)
    assert str(caught.value).endswith((".", "?"))
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name], rtol=0, atol=0, equal_nan=True)


def broken(samples, value):
    inputs = samples[0].clone()
    inputs[3, 2] = value
    return inputs, samples[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["old", "new"])
def test_inputs_that_are_not_finite(which, value):
    samples = broken(task()[1 if which == "old" else 2], value)
    refused(rf"{which} samples of shape .* holds (nan|inf) at \[3, 2\].*Remove or repair", **{which: samples})


def test_values_to_train_on_that_are_not_finite():
    values = torch.zeros(12, 5)
    values[1, 1] = torch.nan
    refused(
        r"new samples of shape \(12, 5\) holds nan", new=(task()[2][0], values), training=fc.GradientDescent(0.1, 3)
    )


@pytest.mark.parametrize("estimator", ["auto", "anchored", "pilot", "static"])
def test_outputs_that_are_not_finite(estimator):
    model = task()[0]
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    training = fc.GradientDescent(0.1, 3) if estimator == "static" else TRAINING
    refused("old logits of shape .* holds nan", model=model, estimator=estimator, training=training)


def test_labels_out_of_range():
    inputs, labels = task()[2]
    refused("new: .*5.*expected .*0 .* 4", new=(inputs, labels + 1))
    refused("new: .*-1.*expected", new=(inputs, labels - 3))
    refused("old: .*9.*expected .*0 .* 4", old=(task()[1][0], torch.full((8,), 9)))
    for wrong in (labels + 0.5, labels[:, None, None]):
        refused(
            "new: .* targets of shape .* that are no labels; expected labels .*, whole numbers", new=(inputs, wrong)
        )
    forecasts = [fc.forecast(*task()[:2], (inputs, kind), TRAINING, budget=1) for kind in (labels, labels.double())]
    assert torch.equal(forecasts[0].drift, forecasts[1].drift)


def test_classes_and_outputs():
    refused(
        r"classes=\(2, 7\) for a model of 5 outputs; expected outputs in 0 .. 4. Grow",
        training=replace(TRAINING, classes=(2, 7)),
    )
    refused("new.*2.*classes|new.*label", training=replace(TRAINING, classes=(3, 4)))
    refused(r"outputs=\[2, 2\]; expected distinct outputs", outputs=[2, 2])
    refused(r"outputs=\[\]; expected distinct outputs", outputs=[])
    refused("old.*label.*0|old.*0", outputs=[2, 3, 4])
    own = task()[2][0], torch.arange(12) % 2
    refused(
        "classes=.* with outputs=.*Add .*3", new=own, training=replace(TRAINING, classes=(0, 1, 3)), outputs=[0, 1, 2]
    )
    for wrong in ([0, 1, 2, 3, 4, 5], [-1, 0, 1, 2, 3, 4]):
        refused("outputs=.*; expected outputs in 0 .. 4", outputs=wrong)


def test_nothing_or_too_little():
    empty = torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64)
    refused("at least one sample", old=empty)
    refused("at least one sample", new=empty)
    refused("new: no targets; expected labels or values to train on. Give new=", new=task()[2][0])
    refused("old: 7 targets for 8 samples; expected one for each", old=(task()[1][0], task()[1][1][1:]))
    refused("new: 11 targets for 12 samples", new=(task()[2][0], task()[2][1][1:]))
    refused("sample as first axis", old=((torch.randn(8, 6), torch.randn(7, 6)), task()[1][1]))
    refused("loader without batches", old=DataLoader(TensorDataset(torch.zeros(0, 6))))


def test_inputs_that_the_model_does_not_take():
    refused(r"old: inputs of shapes \[\(2, 5\)\] that the model.*mat1", old=(torch.randn(8, 5), task()[1][1]))
    refused(r"new: inputs of shapes \[\(2, 7\)\] that the model.*mat1", new=(torch.randn(12, 7), task()[2][1]))
    refused("new: .*TypeError.*unexpected keyword", new={"pixels": task()[2][0], "labels": task()[2][1]})
    words = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 5))
    old, new = ((torch.tensor([[1, word]] * 4), torch.arange(4)) for word in (2, 4))
    refused("new: .*IndexError.*Compare with a batch", model=words, old=old, new=new)


def test_shuffled_loaders():
    loader = DataLoader(TensorDataset(*task()[2]), shuffle=True)
    refused("new: a DataLoader with shuffle=True; expected the same order", new=loader)


@pytest.mark.parametrize("budget", [0, -0.1, float("nan"), float("inf"), "half", True])
def test_budgets(budget, unchecked_types):
    refused("got budget=.*; expected a finite number above 0", budget=budget)


def test_other_settings(unchecked_types):
    refused("got estimator='anchord'; .*Did you mean 'anchored'", estimator="anchord")
    refused("got head='place'; .*Did you mean 'placed'", head="place")
    refused("got seed=-1; expected an integer of at least 0", seed=-1)
    refused("got samples_new=0; expected an integer of at least 1", samples_new=0)
    refused("budget=0.05 of a run of 8 steps x 5 samples, with 8 old .*; expected at least [0-9.]+. Raise", budget=0.05)
    refused("estimator='linear' where 2 parameter tensors outside the head train; .* Choose 'auto'", estimator="linear")
    refused("estimator='pilot' for a Ridge; expected a training in steps", estimator="pilot", training=fc.Ridge(1.0))
    refused("the parameter name '0.wieght'.*nearest are .*0.weight", parameters=["0.wieght"])


def test_nothing_trains():
    model = task()[0].requires_grad_(False)
    refused("leaves none of the model's 4; expected at least one", model=model)
    refused("leaves none", parameters=lambda name, _: False)
    refused("leaves none", parameters=[])


def test_outputs_of_a_wrong_shape():
    refused(r"logits of shape \(2,\) for 2 samples; expected \(samples, outputs\)", outputs=lambda found: found[:, 0])
    refused("expected .samples, outputs", model=nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 5)))
    refused("dict for 2 samples|expected .samples, outputs", outputs=lambda found: {"other": found})


def test_a_head_that_cannot_be_placed():
    model, old, new = task()
    refused(
        "without a linear head that trains; .*Leave head='as_is'", model=nn.Sequential(*model, nn.Tanh()), head="placed"
    )
    model[2].requires_grad_(False)
    refused("without a linear head that trains", model=model, head="placed")
    values = torch.zeros(12, 5)
    refused(
        "targets that are no labels; expected labels",
        new=(new[0], values),
        training=fc.SGD(0.1, 4, loss="squared"),
        head="placed",
    )


def test_old_samples_without_labels_have_drift_and_no_accuracy():
    model, old, new = task()
    for given in (old[0], (old[0], None), {"input": old[0]}):
        forecast = fc.forecast(model, given, new, TRAINING, budget=1)
        assert forecast.relative_drift > 0
        for asked in ("accuracy", "accuracy_before", "per_class", "broken", "interval"):
            with pytest.raises(ValueError, match="no old targets; expected integer labels"):
                getattr(forecast, asked)


def test_a_forecast_that_did_not_check_itself_has_no_interval():
    model, old, new = task()
    forecast = fc.forecast(model, old, new, fc.SGD(0.01, 30, batch_size=12), budget=0.5, estimator="pilot")
    assert not forecast.trust.trusted
    with pytest.raises(ValueError, match="without a check of its own; .* Raise budget"):
        _ = forecast.interval
    still = fc.forecast(model, old, new, fc.GradientDescent(0.01, 3))
    assert still.estimator == "static"
    assert "nothing to check it by" in still.trust.reason
    with pytest.raises(ValueError, match="trajectory of a GradientFlow; expected a training in steps"):
        _ = fc.forecast(model, old, new, fc.GradientFlow(0.1)).trajectory
