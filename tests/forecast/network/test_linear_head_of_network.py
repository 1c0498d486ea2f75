"""A linear head on a frozen body: the forecast of the network is that of the head, exactly."""

import pytest
import torch
from torch import nn
from torch.nn.functional import softmax

import forgetcast as fc
from builders import DOUBLE, relative_error

OLD, NEW, STEPS, BATCH = 15, 31, 17, 7
SCHEDULE = [0.2 * (1 - k / STEPS) for k in range(STEPS)]
ORDER = [[(3 * k + j) % NEW for j in range(2 + k % 3)] for k in range(STEPS)]
MINIBATCH = {"steps": STEPS, "batch_size": BATCH}
BY_STEPS = {
    "sgd": fc.SGD(0.2, **MINIBATCH, classes=(2, 3, 4)),
    "momentum, decay": fc.SGD(0.1, **MINIBATCH, momentum=0.9, weight_decay=0.05, seed=3),
    "nesterov, drift penalty": fc.SGD(0.1, **MINIBATCH, momentum=0.8, nesterov=True, drift_penalty=0.3),
    "sgd, schedule, sum": fc.SGD(SCHEDULE, **MINIBATCH, reduction="sum", loss="squared"),
    "sgd, clipped": fc.SGD(0.5, **MINIBATCH, max_gradient_norm=0.3, momentum=0.5),
    "sgd, order": fc.SGD(0.2, STEPS, order=ORDER, classes=(2, 3, 4)),
    "adam": fc.AdamW(0.02, **MINIBATCH, classes=(4, 2, 3)),
    "adam, decay": fc.AdamW(0.02, **MINIBATCH, weight_decay=0.2, betas=(0.8, 0.95)),
    "adam, schedule, squared": fc.AdamW(SCHEDULE, **MINIBATCH, loss="squared", classes=(2, 3, 4), weight_decay=0.1),
    "adam, order, drift penalty": fc.AdamW(0.03, STEPS, order=ORDER, drift_penalty=0.2, reduction="sum"),
    "adam, clipped": fc.AdamW(0.02, **MINIBATCH, max_gradient_norm=0.2, epsilon=1e-3),
    "descent, cross-entropy": fc.GradientDescent(0.3, STEPS, loss="cross_entropy", momentum=0.6, classes=(2, 3, 4)),
    "descent, squared": fc.GradientDescent(0.05, STEPS, weight_decay=0.1, drift_penalty=0.2),
    "descent, nesterov": fc.GradientDescent(0.03, STEPS, momentum=0.7, nesterov=True, classes=(2, 3, 4)),
}
BY_TIME = {"flow": fc.GradientFlow(2.0, weight_decay=0.1), "ridge": fc.Ridge(0.4, toward="zero")}


def network(*, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.GELU()).requires_grad_(False)
    return nn.Sequential(body, nn.Linear(6, 5, bias=bias)).double()


def samples(kind: str):
    old = torch.randn(OLD, 4, dtype=DOUBLE), torch.randint(0, 2, (OLD,))
    inputs, labels = torch.randn(NEW, 4, dtype=DOUBLE), torch.randint(2, 5, (NEW,))
    if kind == "labels":
        return old, (inputs, labels)
    values = torch.zeros(NEW, 5, dtype=DOUBLE)
    values[:, 2:] = softmax(torch.randn(NEW, 3, dtype=DOUBLE), 1)
    return old, (inputs, values)


def forecast_of_head(model, old, new, training):
    body, head = model
    before, phi = (fc.Features(body(inputs).detach(), targets) for inputs, targets in (old, new))
    return fc.forecast_linear(before, phi, fc.LinearHead.from_module(head), training)


def same(found, truth):
    assert relative_error(found.drift, truth.drift) < 1e-8
    assert relative_error(found.logits, truth.logits) < 1e-8
    assert found.accuracy == truth.accuracy
    assert relative_error(found.end.weight.T, torch.as_tensor(truth.head_after.weight)) < 1e-8
    assert relative_error(found.end.bias, torch.as_tensor(truth.head_after.bias)) < 1e-8


@pytest.mark.parametrize("kind", ["labels", "values"])
@pytest.mark.parametrize("name", BY_STEPS)
def test_equals_the_linear_forecast(name, kind):
    model, (old, new) = network(), samples(kind)
    truth = forecast_of_head(model, old, new, BY_STEPS[name])
    found = fc.forecast(model, old, new, BY_STEPS[name])
    assert found.estimator == "linear"
    assert found.trust.exact
    assert found.interval == (found.accuracy, found.accuracy)
    same(found, truth)
    anchored = fc.forecast(model, old, new, BY_STEPS[name], estimator="anchored", budget=1)
    assert anchored.trust.exact
    same(anchored, truth)


@pytest.mark.parametrize("name", BY_TIME)
def test_equals_the_linear_forecast_without_steps(name):
    model, (old, new) = network(), samples("labels")
    found = fc.forecast(model, old, new, BY_TIME[name])
    assert found.estimator == "linear"
    same(found, forecast_of_head(model, old, new, BY_TIME[name]))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_half_of_a_head(frozen):
    """What does not train stays; this is no forecast of `forecast_linear`, which moves both."""
    model, (old, new) = network(), samples("labels")
    getattr(model[1], frozen).requires_grad_(False)
    found = fc.forecast(model, old, new, BY_STEPS["adam, decay"], budget=1)
    assert found.estimator == "anchored"
    assert torch.equal(getattr(found.end, frozen), getattr(found.start, frozen))
    assert found.relative_drift > 0.01


def test_a_head_without_bias():
    model, (old, new) = network(bias=False), samples("labels")
    truth = forecast_of_head(model, old, new, BY_STEPS["adam"])
    for estimator in ("linear", "anchored"):
        found = fc.forecast(model, old, new, BY_STEPS["adam"], estimator=estimator, budget=1)
        assert relative_error(found.drift, truth.drift) < 1e-8


class Called(nn.Module):
    """A head that is found, or must not be taken for one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.head = network()
        self.how = how
        if how == "hook doubles":
            self.head.register_forward_hook(lambda layer, given, output: 2 * output)
        if how == "tied":
            self.also = nn.Linear(6, 5, dtype=DOUBLE)
            self.also.weight = self.head.weight

    def forward(self, x):
        phi = self.body(x)
        if self.how == "by name":
            return {"logits": self.head(input=phi)}
        if self.how == "twice":
            return self.head(phi + self.head(phi)[:, :1])
        return self.head(phi).tanh() if self.how == "squashed" else self.head(phi)


@pytest.mark.parametrize("how", ["by name", "hook doubles", "twice", "squashed", "tied"])
def test_only_what_is_linear_counts_as_a_linear_head(how):
    torch.manual_seed(1)
    model, (old, new) = Called(how), samples("labels")
    training = fc.SGD(0.1, 6, batch_size=5, classes=(2, 3, 4))
    found = fc.forecast(model, old, new, training, budget=1)
    assert (found.estimator == "linear") == (how == "by name")
    replay = fc.forecast(model, old, new, training, estimator="pilot", budget=1)
    assert relative_error(found.drift, replay.drift) < 1e-10
    assert relative_error(found.logits_before, fc.forecast(model, old, new, fc.SGD(0.1, 0)).logits) == 0
