"""EASE: each task trains adapters of its own alone, and the answer is that of its equations on the features of all."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from digit_tasks import samples, task_of
from small import stream
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from tuned import Transformer

from forgetcast.heads.prototype import Prototype
from forgetcast.heads.subspaces import Subspaces
from forgetcast.learn.cost import stored_numbers
from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Batch
from forgetcast.methods.ease import EASE
from forgetcast.streams.domains import domain_incremental
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import Source
from forgetcast.streams.variants import blurry

WIDTH, BLOCKS, RANK = 20, 2, 8
OPTIMIZATION = Optimization("sgd", learning_rate=0.05, epochs=2, batch_size=32, momentum=0.9)


def method(**options) -> EASE:
    torch.manual_seed(4)
    return EASE(Transformer(WIDTH), WIDTH, **{"rank": RANK} | options)


def step(made: EASE, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    made.loss(batch).backward()
    optimizer.step()


def trained(tasks: int, steps: int = 4, **options) -> EASE:
    made = method(**options)
    for index in range(tasks):
        task = task_of(index)
        made.begin_task(task)
        made.model.train()
        optimizer = torch.optim.Adam(made.parameter_groups(), lr=0.05)
        for batch, _ in zip(task.batches(), range(steps), strict=False):
            step(made, batch, optimizer)
        made.end_task(task)
    return made


def questions() -> Tensor:
    return torch.from_numpy(stream().source.inputs[np.concatenate([task.test for task in stream().tasks])])


def test_a_task_trains_its_own_adapters_and_proxies_and_all_of_them():
    made, task = trained(1), task_of(1)
    made.begin_task(task)
    made.model.train()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    optimizer = torch.optim.SGD(made.parameter_groups(), lr=0.5)
    for batch, _ in zip(task.batches(), range(2), strict=False):  # the first moves what starts at zero
        step(made, batch, optimizer)
    after = made.model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    training = {name for name, value in made.model.named_parameters() if value.requires_grad}
    assert moved == training
    assert training == {name for name in before if name.startswith(("backbone.newest.", "proxies."))}
    grouped = [value for group in made.parameter_groups() for value in group["params"]]
    assert sum(value.numel() for value in grouped) == BLOCKS * (2 * WIDTH * RANK + WIDTH + RANK) + 2 * WIDTH + 1


def test_old_adapters_and_the_transformer_never_move_again():
    transformer = {
        f"backbone.{name}": value for name, value in Transformer.state_dict(method().network.backbone).items()
    }
    ends = [trained(count).network.state_dict() for count in (1, 2, 3)]
    for before, after in pairwise([transformer, *ends]):
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert len(after) > len(before)
    settled = [name for name in ends[-1] if name.startswith("settled.")]
    assert {name.split(".")[1] for name in settled} == {"0", "1", "2"}
    assert len(ends[-1]) == len(transformer) + len(settled)


def test_the_loss_is_of_scaled_cosines_among_the_classes_of_the_task():
    made, task = trained(1, dropout=0.0), task_of(1)
    made.begin_task(task)
    (batch, *_) = task.batches()
    assert made.proxies.scale.item() == 1.0
    assert made.proxies.weight.abs().max().item() <= WIDTH**-0.5
    with torch.no_grad():
        made.proxies.scale.fill_(3.0)
    phi = made.network.current(batch.inputs)
    logits = 3.0 * normalize(phi) @ normalize(made.proxies.weight).T
    assert logits.shape[1] == len(task.classes)
    places = torch.tensor([sorted(task.classes).index(label) for label in batch.labels.tolist()])
    torch.testing.assert_close(made.loss(batch), cross_entropy(logits, places))


def test_after_one_task_it_is_the_nearest_mean_of_that_subspace():
    made = trained(1)
    made.model.eval()
    plain = Prototype(WIDTH, 2)
    inputs, labels = samples(0)
    with torch.no_grad():
        made.network.newest = made.network.settled[0]
        plain.observe(made.network.current(inputs), labels)
        plain.solve()
        expected = plain(made.network.current(questions()))
    torch.testing.assert_close(made.predict(questions()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"beta": 0.5, "alpha": 0.3, "recipe": "released"}])
def test_answers_are_those_of_class_means_in_all_subspaces(options):
    """Of features that are made here, set of adapters by set of adapters."""
    made = trained(3, **options)
    made.model.eval()

    def features(inputs: Tensor, tasks: int) -> Tensor:
        found = [made.network.backbone(inputs)] if options else []
        for settled in made.network.settled[:tasks]:
            made.network.newest = settled
            found.append(made.network.current(inputs))
        return torch.cat(found, 1)

    form = {"form" if name == "recipe" else name: value for name, value in options.items()}
    head = Subspaces(WIDTH, **form)
    with torch.no_grad():
        for index in range(3):
            inputs, labels = samples(index)
            head.grow(2 * index + 2)
            head.extend()
            head.observe(features(inputs, index + 1), labels)
            head.solve()
        expected = head(features(questions(), 3))
    torch.testing.assert_close(made.predict(questions()), expected, rtol=0, atol=1e-6)


def test_adapters_make_other_subspaces_and_weights_other_answers():
    made = trained(3)
    sections = made.model.features(questions()).chunk(3, 1)
    assert all(float((a - b).norm() / a.norm()) > 1e-3 for a, b in pairwise(sections))
    answers = [trained(3, **options).predict(questions()) for options in ({}, {"alpha": 0.0}, {"beta": 1.0})]
    assert all(float((other - answers[0]).abs().max()) > 1e-2 for other in answers[1:])


def test_within_a_task_it_answers_as_at_the_end_of_the_one_before():
    made, task = trained(1), task_of(1)
    before = made.predict(questions())
    made.begin_task(task)
    (batch, *_) = task.batches()
    step(made, batch, torch.optim.SGD(made.parameter_groups(), lr=0.5))
    within = made.predict(questions())
    torch.testing.assert_close(within[:, :2], before, rtol=0, atol=1e-14)
    assert (within[:, 2:] < -1).all()
    fresh = method()
    fresh.begin_task(task_of(0))
    assert (fresh.predict(questions()) < -1).all()


@pytest.mark.parametrize("begun", [False, True])
def test_resumed_within_a_task_and_between_two(begun):
    made, other = trained(2), trained(3, steps=1)
    task = task_of(2)
    optimizers = []
    if begun:
        made.begin_task(task)
        (batch, *_) = task.batches()
        step(made, batch, torch.optim.SGD(made.parameter_groups(), lr=0.5))
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for fresh in (method(), other):  # one that has seen nothing, and one that has seen more
        fresh.load_state_dict(state)
        assert fresh.state_dict().keys() == made.state_dict().keys()
        assert torch.equal(fresh.predict(questions()), made.predict(questions()))
    fresh = method()
    fresh.load_state_dict(state)
    for each in (made, fresh):
        torch.manual_seed(9)
        if not begun:
            each.begin_task(task)
        each.model.train()
        optimizers.append(torch.optim.SGD(each.parameter_groups(), lr=0.5))
        for batch in task.batches():
            step(each, batch, optimizers[-1])
        each.end_task(task)
    ours, theirs = made.model.state_dict(), fresh.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert torch.equal(fresh.predict(questions()), made.predict(questions()))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_memory_grows_as_it_says(beta):
    transformer = sum(value.numel() for value in Transformer(WIDTH).parameters())
    for tasks in (1, 2, 3):
        classes, made = 2 * tasks, trained(tasks, steps=1, beta=beta)
        adapters = tasks * BLOCKS * (2 * WIDTH * RANK + WIDTH + RANK)
        means = classes * (tasks * (WIDTH + 1) + 1) + (classes * (WIDTH + 1) if beta else 0)
        assert stored_numbers(made.state_dict()) == transformer + adapters + means + 1  # whether the head is solved


def test_tasks_of_unequal_sizes_with_labels_in_any_order():
    source = stream().source
    kept = (source.labels < 6).nonzero()[0]
    tasks = class_incremental(
        Source("digits", source.inputs[kept], source.labels[kept]), 1, base=3, class_order=[5, 2, 4, 0, 1, 3]
    )
    made = method()
    done = learn(made, tasks, OPTIMIZATION, seed=2)
    assert made.subspaces.own.int().sum(0).tolist() == [3, 1, 1, 1]
    assert [len(row) for row in done.accuracy_matrix] == [1, 2, 3, 4]


def test_domains_bring_their_classes_again():
    source = stream().source
    parts = [source.inputs[:150], 1 - source.inputs[150:300]]
    sources = [Source(f"part {k}", part, source.labels[150 * k :][:150]) for k, part in enumerate(parts)]
    tasks = domain_incremental(sources, seed=1)
    made = method()
    learn(made, tasks, OPTIMIZATION, seed=2)
    assert made.subspaces.own.all()
    assert torch.equal(made.subspaces.votes, torch.full_like(made.subspaces.votes, 0.5))


def test_samples_of_other_classes_are_refused():
    with pytest.raises(ValueError, match=r"samples of outputs \[.*in a task that brings \[0, 1\].*not blurry"):
        learn(method(), blurry(stream(), 0.4), OPTIMIZATION)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "corrected"}, "recipe='corrected'; expected one of"),
        ({"rank": 0}, "rank=0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"beta": float("nan")}, "beta=nan"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no list of transformer blocks in Sequential"):
        EASE(torch.nn.Sequential(torch.nn.Linear(64, WIDTH)), WIDTH)
