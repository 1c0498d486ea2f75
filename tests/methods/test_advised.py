"""Training as a forecast advises: what was forecast of the choice is what comes of it, and nothing else trains."""

from importlib import import_module

import pytest
import torch
from small import stream
from torch import nn

from forgetcast.heads.linear import Linear
from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.advised import Advised
from forgetcast.methods.base import Batch, Model, TaskData

OPTIMIZATION = Optimization("sgd", learning_rate=0.1, epochs=3, batch_size=32, momentum=0.9)


def method(**options) -> Advised:
    torch.manual_seed(3)
    layers = [nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 12)]
    return Advised(Model(nn.Sequential(*layers), Linear(12)), **{"budget": 1.0, "capacity": 60, **options})


def learnt(made: Advised, tasks: int) -> Advised:
    learn(made, stream(), OPTIMIZATION, seed=4, until=tasks)
    return made


def accuracy(made: Advised, inputs, labels) -> float:
    with torch.no_grad():
        logits = made.model(inputs)
    allowed = torch.zeros(logits.shape[1], dtype=torch.bool)
    allowed[list(made.seen)] = True
    return float((logits.masked_fill(~allowed, -torch.inf).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("lengths", [(1.0,), (0.5,), (0.25, 0.5, 1.0)])
@pytest.mark.parametrize("loss_outputs", ["seen", "task"])
def test_what_a_whole_replay_forecasts_is_what_comes(lengths, loss_outputs):
    made = learnt(method(lengths=lengths, loss_outputs=loss_outputs), 1)
    old = made.memory.draw(1000)
    made = learnt(method(lengths=lengths, loss_outputs=loss_outputs), 2)
    told = made.decided()[0]
    assert told["task"] == 1
    assert told["length"] in lengths
    assert accuracy(made, old["inputs"], old["labels"]) == pytest.approx(told["old_accuracy"], abs=0.5 / 60)
    new = (
        torch.from_numpy(stream().source.inputs[stream()[1].train]),
        torch.from_numpy(stream().outputs[stream()[1].train]),
    )
    assert len(new[1]) <= 256  # all of them are read
    assert accuracy(made, *new) == pytest.approx(told["new_accuracy"], abs=0.5 / len(new[1]))
    assert told["score"] == pytest.approx((told["old_accuracy"] + told["new_accuracy"]) / 2, abs=0.05)  # smoothed


def test_parameters_and_running_statistics_go_back_together(monkeypatch):
    seen = {}

    class Watched(Advised):
        def begin_task(self, task):
            super().begin_task(task)
            seen["start"] = {name: value.clone() for name, value in self.model.state_dict().items()}

        def end_task(self, task):
            seen["end"] = {name: value.clone() for name, value in self.model.state_dict().items()}
            super().end_task(task)

    advice = import_module("forgetcast.forecast.network.advice")
    monkeypatch.setattr(advice, "choose", lambda points, _: points[-1])  # all of it trains
    torch.manual_seed(3)
    layers = [nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 12)]
    made = Watched(Model(nn.Sequential(*layers), Linear(12)), lengths=(0.25,), budget=1.0, capacity=60)
    found = learnt(made, 2).model.state_dict()
    assert made.decided()[0]["candidate"] == "all"
    for name, end in seen["end"].items():
        if end.is_floating_point():
            assert not torch.equal(seen["start"][name], end)
            torch.testing.assert_close(found[name], torch.lerp(seen["start"][name], end, 0.25))
    assert not made.start


def test_what_is_not_chosen_stands_still_and_may_train_again():
    made = learnt(method(max_drop=0.0), 1)
    before = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    made = learnt(method(max_drop=0.0), 2)
    told = made.decided()[0]
    moved = {
        name
        for name, value in made.model.named_parameters()
        if not torch.equal(value[: len(before[name])], before[name])
    }
    sets = {"head": 1, "last 1": 3, "last 2": 5, "all": 7}
    assert moved <= set(list(before)[::-1][: 2 * sets[told["candidate"]]])
    assert told["trained"] == sum(value.numel() for value in made.model.parameters() if value.requires_grad)
    assert set(made.names) == set(before)
    whole = learnt(method(max_drop=1.0), 3).decided()
    assert [one["task"] for one in whole] == [1, 2]


def test_a_limit_is_kept_where_something_keeps_it():
    free, tight = (learnt(method(max_drop=limit), 2).decided()[0] for limit in (None, 0.0))
    assert tight["drop"] <= free["drop"]
    assert free["score"] >= tight["score"]
    assert free["trusted"]


def test_a_loop_that_does_not_say_how_it_trains():
    made = learnt(method(), 1)
    inputs, labels = torch.randn(8, 64), torch.tensor([2, 3] * 4)
    task = TaskData(1, (2, 3), (0, 1, 2, 3), lambda: iter([Batch(inputs, labels, torch.arange(8))]))
    with pytest.raises(ValueError, match="does not say how it is trained"):
        made.begin_task(task)


def test_forecasts_of_its_next_task_only_where_it_goes_the_whole_way():
    assert learnt(method(), 1).plain_outputs() == (0, 1)
    assert learnt(method(lengths=(0.5, 1.0)), 1).plain_outputs() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity"),
        ({"lengths": (2.0,)}, "lengths"),
        ({"max_drop": -1.0}, "max_drop"),
        ({"budget": 0.0}, "budget"),
        ({"lengths": ()}, "lengths"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        learnt(method(**options), 2)
