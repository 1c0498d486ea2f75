"""The first session is fine-tuning of the backbone, after which the method is the closed form on what came out."""

import copy
from dataclasses import replace

import pytest
import torch
from small import stream
from torch import nn

from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Batch
from forgetcast.methods.registry import create, takes_steps
from forgetcast.streams.stream import Stream

OPTIMIZATION = Optimization(learning_rate=1e-2, epochs=3, batch_size=32)
OPTIONS = {"ranpac": {"size": 100}, "simplecil": {}}
every_method = pytest.mark.parametrize("name", OPTIONS)


def backbone():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(64, 20), nn.ReLU())


def tasks(count: int) -> Stream:
    return replace(stream(), tasks=stream().tasks[:count])


def adapted(name, count):
    part = backbone()
    method = create(name, part, 20, first_session=True, **OPTIONS[name])
    return method, part, learn(method, tasks(count), OPTIMIZATION, seed=3)


@every_method
def test_the_session_trains_the_backbone_as_fine_tuning_does(name):
    _, part, _ = adapted(name, 1)
    plain = backbone()
    learn(create("sequential", plain, 20), tasks(1), OPTIMIZATION, seed=3)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in part.state_dict().items())
    assert not torch.equal(part[0].weight, backbone()[0].weight)


@every_method
def test_then_it_is_the_closed_form_on_the_frozen_backbone(name):
    method, part, done = adapted(name, 3)
    frozen = copy.deepcopy(adapted(name, 1)[1])
    closed = create(name, frozen, 20, **OPTIONS[name])
    expected = learn(closed, tasks(3), OPTIMIZATION, seed=3)
    assert done.accuracy_matrix == expected.accuracy_matrix
    assert all(torch.equal(value, frozen.state_dict()[key]) for key, value in part.state_dict().items())
    assert method.state_dict()["model"].keys() == closed.state_dict()["model"].keys()
    numbers = sum(parameter.numel() for parameter in part.parameters())
    assert done.trainable_parameters == [numbers + 2 * 21, 0, 0]


@every_method
def test_what_is_frozen_stays_so(name):
    part = backbone()
    part[0].bias.requires_grad_(False)
    before = part[0].bias.clone()
    learn(create(name, part, 20, first_session=True, **OPTIONS[name]), tasks(2), OPTIMIZATION, seed=3)
    assert torch.equal(part[0].bias, before)


@every_method
def test_an_evaluation_within_the_session_is_of_its_head(name):
    method = create(name, backbone(), 20, first_session=True, **OPTIONS[name])
    within = learn(method, tasks(1), OPTIMIZATION, seed=3, evaluate_every=4)
    assert within.evaluations[-2][0] > 0.9


@every_method
def test_steps_are_refused_where_there_are_none(name):
    method, _, _ = adapted(name, 1)
    with pytest.raises(ValueError, match="gradient step"):
        method.loss(Batch(torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64), torch.arange(2)))
    with pytest.raises(ValueError, match="nothing trains.*Unfreeze"):
        create(name, nn.Identity(), 20, first_session=True)
    assert takes_steps(name, {"first_session": True})
    assert not takes_steps(name, {})
