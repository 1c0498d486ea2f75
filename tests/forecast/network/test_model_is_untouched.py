"""Whatever a forecast does, and wherever it stops, the model and the random numbers are as they were before."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import forgetcast as fc

ADAM = fc.AdamW(5e-3, 12, batch_size=6, classes=(2, 3))
CASES = {
    "anchored": {"training": ADAM, "estimator": "anchored", "budget": 0.9},
    "anchored, placed, few samples": {"training": ADAM, "budget": 0.9, "head": "placed", "samples_new": 15},
    "anchored, clipped": {"training": replace(ADAM, max_gradient_norm=0.1), "estimator": "anchored", "budget": 0.9},
    "the run": {"training": ADAM, "estimator": "anchored", "budget": 1},
    "pilot": {"training": ADAM, "estimator": "pilot", "budget": 0.9},
    "static": {"training": fc.GradientDescent(0.01, 5), "estimator": "static"},
    "linear": {"training": ADAM, "estimator": "linear", "parameters": ["head.weight", "head.bias"]},
}


class StopHereError(Exception):
    pass


class Model(nn.Module):
    """A frozen part, a shared one, running statistics, dropout, modes that differ, hooks; stops when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.shared, self.drop = nn.Linear(6, 6), nn.Dropout(0.4)
        self.scale, self.head = nn.Parameter(torch.rand(6)), nn.Linear(6, 4)
        self.trunk.requires_grad_(False)
        self.norm.running_mean.normal_()
        self.passes, self.stop_at = 0, -1

    def forward(self, x):
        self.passes += 1
        if self.passes == self.stop_at:
            raise StopHereError
        h = self.norm(self.trunk(x))
        h = self.drop(self.shared(torch.tanh(self.shared(h))) * self.scale)
        return self.head(h)


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = Model().train()
    model.norm.eval()
    for name, parameter in model.named_parameters():
        if name != "shared.weight":
            parameter.grad = torch.randn_like(parameter)
    model.head.register_forward_hook(lambda *_: None)
    return model, (torch.randn(9, 5), torch.arange(9) % 2), (torch.randn(20, 5), 2 + torch.arange(20) % 2)


def state(model):
    own = {name: value.clone() for name, value in model.state_dict().items()}
    own |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    rest = [
        [p.requires_grad for p in model.parameters()],
        [id(p) for p in model.parameters()],
        [module.training for module in model.modules()],
        [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        [sorted(vars(module)) for module in model.modules()],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        torch.is_grad_enabled(),
    ]
    return own, rest


def same(before, after):
    assert before[0].keys() == after[0].keys()
    assert [name for name, value in before[0].items() if not torch.equal(value, after[0][name])] == []
    for left, right in zip(before[1], after[1], strict=True):
        assert left == right


@pytest.mark.parametrize("name", CASES)
def test_after_a_forecast(name, case):
    model, old, new = case
    settings = dict(CASES[name])
    before = state(model)
    samples = [tensor.clone() for tensor in (*old, *new)]
    forecast = fc.forecast(model, old, new, settings.pop("training"), **settings)
    assert forecast.relative_drift > 0  # it has done something
    same(before, state(model))
    assert all(torch.equal(left, right) for left, right in zip(samples, (*old, *new), strict=True))
    for tensor in (forecast.drift, forecast.end.theta, forecast.end.weight):
        assert not tensor.requires_grad
    # the same again: it keeps nothing of its own either
    settings = dict(CASES[name])
    again = fc.forecast(model, old, new, settings.pop("training"), **settings)
    assert torch.equal(again.drift, forecast.drift)


@pytest.mark.parametrize("name", CASES)
def test_after_an_error_in_any_part_of_it(name, case):
    model, old, new = case
    fc.forecast(model, old, new, **CASES[name])
    total = model.passes
    before = state(model)
    for place in sorted({*range(1, min(6, total)), total // 3, total // 2, 2 * total // 3, total - 1, total}):
        model.passes, model.stop_at = 0, place
        try:
            fc.forecast(model, old, new, **CASES[name])
        except StopHereError:
            pass
        else:
            assert place < 7  # the survey's try of `vmap`, whose errors only mean that it is not for it
        same(before, state(model))


@pytest.mark.parametrize("name", ["anchored", "the run", "pilot"])
def test_after_an_error_in_the_callers_own_code(name, case):
    model, old, new = case
    before = state(model)

    def stop(step: int) -> None:
        if step == 7:
            raise StopHereError

    with pytest.raises(StopHereError):
        fc.forecast(model, old, new, on_step=stop, **CASES[name])
    same(before, state(model))


def test_after_a_training_that_diverges(case):
    model, old, new = case
    before = state(model)
    training = fc.SGD(1e30, 12, batch_size=6, loss="squared")
    for estimator, budget in (("anchored", 0.9), ("anchored", 1), ("pilot", 0.9)):
        with pytest.raises(ValueError, match="diverges.*; expected one that stays finite. Lower the learning rate"):
            fc.forecast(model, old, new, training, estimator=estimator, budget=budget)
        same(before, state(model))


def test_inside_other_modes(case):
    """Under `no_grad` and `inference_mode` of the caller, as evaluation code often is."""
    model, old, new = case
    plain = fc.forecast(model, old, new, **CASES["anchored"])
    with torch.no_grad():
        quiet = fc.forecast(model, old, new, **CASES["anchored"])
        pilot = fc.forecast(model, old, new, **CASES["pilot"])
        assert not torch.is_grad_enabled()
    assert torch.equal(quiet.drift, plain.drift)
    assert torch.equal(pilot.drift, fc.forecast(model, old, new, **CASES["pilot"]).drift)
