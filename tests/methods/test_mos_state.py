"""MOS, kept and taken up again: what a state holds, how it grows, and what is refused."""

import io

import pytest
import torch
from test_inflora import WIDTH, copied, read, source, stream, task_of, train
from test_mos import BLOCKS, RANK, asked, learnt, method, questions
from torch import nn

from forgetcast.learn.cost import stored_numbers
from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Batch
from forgetcast.methods.mos import MOS
from forgetcast.streams.domains import domain_incremental
from forgetcast.streams.variants import blurry


@pytest.mark.parametrize("begun", [False, True])
def test_resumed_within_a_task_and_between_two(begun):
    whole, task = learnt(method(), 2), task_of(stream("vit"), 2)
    if begun:
        whole.begin_task(task)
        train(whole, task, 1)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(77)
    resumed = learnt(method(), 3, epochs=1)  # which has seen more
    resumed.load_state_dict(state)
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    assert torch.equal(asked(resumed, questions("vit")), asked(whole, questions("vit")))
    for made in (whole, resumed):
        torch.manual_seed(9)
        if not begun:
            made.begin_task(task)
        train(made, task, 2)
        made.end_task(task)
    ours, theirs = copied(whole.model), copied(resumed.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for label, values in whole.gaussians.classes.items():
        assert all(torch.equal(value, resumed.gaussians.classes[label][name]) for name, value in values.items())


def test_memory_grows_by_adapters_and_statistics_alone():
    sizes = {}
    for each in (4, 8):
        made, sizes[each] = method(), []
        for index in range(2):
            task = task_of(stream("vit", each), index)
            made.begin_task(task)
            made.end_task(task)
            sizes[each].append(stored_numbers(made.state_dict()))
    assert sizes[4] == sizes[8]
    row_mean_count_owner = (WIDTH + 1) + (WIDTH + 1) + 1
    grown = BLOCKS * (2 * WIDTH * RANK + WIDTH + RANK) + 2 * (row_mean_count_owner + WIDTH + WIDTH**2)
    assert sizes[4][1] - sizes[4][0] == grown


def test_a_class_that_comes_again_belongs_to_the_last_task():
    tasks = domain_incremental([source("vit"), source("vit", 1)], seed=0, test_share=0.25)
    made = method()
    learn(made, tasks, Optimization("sgd", 0.05, epochs=1, batch_size=4))
    assert made.head.owner.tolist() == [1] * 6
    assert made.head.means.counts.sum() == sum(len(task.train) for task in tasks.tasks)


def test_samples_of_other_classes_are_refused():
    with pytest.raises(ValueError, match=r"samples of outputs \[.*in a task that brings \[0, 1\].*not blurry"):
        learn(method(), blurry(stream("vit"), 0.4), Optimization("sgd", 0.05, epochs=1, batch_size=4))
    made = method()
    made.begin_task(task_of(stream("vit"), 0))
    inputs, labels = read(stream("vit"), 1)
    with pytest.raises(ValueError, match=r"samples of outputs \[2, 3\]"):
        made.loss(Batch(inputs, labels, labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"contrast": -1.0}, "contrast=-1.0"),
        ({"rounds": 0}, "rounds=0"),
        ({"rate": -1.0}, "rate=-1.0"),
        ({"epochs": -1}, "epochs=-1"),
        ({"samples": 0}, "samples=0"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no list of transformer blocks in Sequential"):
        MOS(nn.Sequential(nn.Linear(64, WIDTH)), WIDTH)
