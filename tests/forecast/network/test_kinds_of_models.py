"""Models of every build: what goes in, what comes out, what is frozen, shared or kept in buffers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from real_run import measured_drift, really_trained
from torch import Tensor, nn

import forgetcast as fc
from builders import DOUBLE, relative_error
from forgetcast.tangent.inputs import at, called, tensors, transformed

OLD, NEW = 8, 25
TRAINING = fc.AdamW(5e-3, 10, batch_size=6, weight_decay=0.1, classes=(2, 3))
LONGER = replace(TRAINING, learning_rate=1e-2, steps=20, batch_size=8)


class Function(nn.Module):
    """Modules by name and a forward beside them."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | nn.Parameter):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.compute = forward

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.compute(self, *inputs, **named)


@dataclass
class Kind:
    """A model, inputs of all samples (the old ones first), and how its answer is read."""

    model: nn.Module
    inputs: Any
    read: Callable[[Any], Tensor] | None = None
    head: bool = True


KINDS: dict[str, Callable[[], Kind]] = {}


def kind(make: Callable[[], Kind]) -> Callable[[], Kind]:
    KINDS[make.__name__] = make
    return make


def randn(*shape: int) -> Tensor:
    return torch.randn(OLD + NEW, *shape, dtype=DOUBLE)


@kind
def inputs_by_place() -> Kind:
    model = Function(
        lambda self, x, y: self.head(torch.tanh(self.left(x) + self.right(y))),
        left=nn.Linear(3, 6),
        right=nn.Linear(4, 6),
        head=nn.Linear(6, 4),
    )
    return Kind(model, (randn(3), randn(4)))


@kind
def inputs_by_name_and_answers_by_name() -> Kind:
    def forward(self, *, words, more):
        h = torch.tanh(self.embedding(words).mean(1) + self.layer(more["x"]))
        return {"hidden": h, "logits": self.head(h)}

    model = Function(forward, embedding=nn.Embedding(9, 6), layer=nn.Linear(3, 6), head=nn.Linear(6, 4))
    return Kind(model, {"words": torch.randint(0, 9, (OLD + NEW, 5)), "more": {"x": randn(3)}})


@kind
def an_answer_that_has_to_be_read() -> Kind:
    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return [("unused", h), {"answer": self.head(h)}]

    model = Function(forward, layer=nn.Linear(5, 6), head=nn.Linear(6, 4))
    return Kind(model, randn(5), lambda found: found[1]["answer"])


@kind
def an_answer_that_is_read_with_a_temperature() -> Kind:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    return Kind(model, randn(5), lambda logits: logits / 1.5, head=False)


@kind
def a_frozen_body_with_an_adapter_inside() -> Kind:
    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.second(h + self.up(torch.relu(self.down(h)))))
        return self.head(h)

    model = Function(
        forward,
        first=nn.Linear(5, 6).requires_grad_(False),
        second=nn.Linear(6, 6).requires_grad_(False),
        down=nn.Linear(6, 3),
        up=nn.Linear(3, 6),
        head=nn.Linear(6, 4),
    )
    return Kind(model, randn(5))


@kind
def a_frozen_head() -> Kind:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    model[2].requires_grad_(False)
    return Kind(model, randn(5))


@kind
def a_layer_used_three_times() -> Kind:
    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.shared(x))
        return self.head(x)

    return Kind(Function(forward, shared=nn.Linear(5, 5), head=nn.Linear(5, 4)), randn(5))


@kind
def tied_weights() -> Kind:
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    return Kind(nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(5, 4)), randn(5))


@kind
def a_head_used_twice() -> Kind:
    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return self.head(h) - self.head(-h * self.scale)

    model = Function(forward, layer=nn.Linear(5, 6), head=nn.Linear(6, 4), scale=nn.Parameter(torch.rand(6)))
    return Kind(model, randn(5), head=False)


@kind
def running_statistics_and_dropout() -> Kind:
    layers = [nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.BatchNorm1d(12)]
    model = nn.Sequential(*layers, nn.Dropout(0.3), nn.Linear(12, 4)).train()
    for module in model:
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return Kind(model, randn(2, 5))


@kind
def attention() -> Kind:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.2)
    return Kind(
        Function(lambda self, x: self.head(self.layer(x).mean(1)), layer=layer, head=nn.Linear(6, 4)), randn(3, 6)
    )


@kind
def a_body_under_no_grad_with_parameters_that_nobody_uses() -> Kind:
    def forward(self, x):
        with torch.no_grad():
            h = torch.tanh(self.trunk(x))
        return self.head(torch.tanh(self.layer(h)))

    parts = {"trunk": nn.Linear(5, 6), "layer": nn.Linear(6, 6), "never": nn.Linear(2, 2), "head": nn.Linear(6, 4)}
    model = Function(forward, **parts)
    model.trunk.requires_grad_(False)
    return Kind(model, randn(5))


class Indexed(nn.Module):
    """The model as a function of the number of a sample, for a training loop that knows tensors alone."""

    def __init__(self, of: Kind) -> None:
        super().__init__()
        self.model, self.inputs, self.read = of.model, of.inputs, of.read

    def forward(self, places: Tensor) -> Tensor:
        found = called(self.model, transformed(self.inputs, lambda x: x[places]))
        if self.read is not None:
            return self.read(found)
        return found["logits"] if isinstance(found, dict) else found


def given(name: str) -> tuple[Kind, tuple[Any, Tensor], tuple[Any, Tensor]]:
    torch.manual_seed(0)
    made = KINDS[name]()
    made.model.double()
    old, new = at(made.inputs, slice(0, OLD)), at(made.inputs, slice(OLD, OLD + NEW))
    signal = next(tensors(new)).double().flatten(1).sum(1)  # something to learn
    return made, (old, torch.arange(OLD) % 2), (new, 2 + (signal > signal.median()).long())


@pytest.mark.parametrize("estimator", ["anchored", "pilot"])
@pytest.mark.parametrize("name", KINDS)
def test_with_the_whole_budget_it_is_the_real_run(name, estimator):
    made, old, new = given(name)
    indexed, places = Indexed(made), torch.arange(OLD, OLD + NEW)
    real = really_trained(indexed, (places, new[1]), TRAINING)
    drift = measured_drift(indexed, real, (torch.arange(OLD), None))
    forecast = fc.forecast(made.model, old, new, TRAINING, outputs=made.read, estimator=estimator, budget=1)
    assert forecast.relative_drift > 1e-3
    # a parameter that nobody uses decays in the forecast, where PyTorch leaves it alone; the drift does not see it
    assert relative_error(forecast.drift, drift) < (1e-8 if made.head else 1e-6)
    assert (forecast._net.head is not None) == made.head


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", KINDS)
def test_with_part_of_it_the_forecast_is_near_and_the_model_as_it_was(name):
    made, old, new = given(name)
    modes = [module.training for module in made.model.modules()]
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    run = fc.forecast(made.model, old, new, LONGER, outputs=made.read, budget=1).drift
    forecast = fc.forecast(made.model, old, new, LONGER, outputs=made.read, budget=0.95)
    assert forecast.estimator == "anchored"
    assert forecast.share_of_run <= 0.95
    assert torch.cosine_similarity(forecast.drift.flatten(), run.flatten(), 0) > 0.8
    layers = fc.drift_by_layer(made.model, old, forecast)
    assert layers["parameters"].sum() == sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    assert fc.kernel_movement(made.model, old, forecast)["after"]["all"] > 0
    assert modes == [module.training for module in made.model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in made.model.state_dict().items())
