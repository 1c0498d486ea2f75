"""MOS through whole transformers, of images and of padded texts: what trains, what stays, and which adapter answers."""

from functools import cache

import pytest
import torch
from test_inflora import WIDTH, copied, pretrained, read, stream, task_of, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from forgetcast.backbones.huggingface import Pooled
from forgetcast.heads.base import UNSEEN
from forgetcast.methods.mos import MOS
from forgetcast.modes import evaluating
from forgetcast.protect.gaussians import JITTER
from forgetcast.protect.instances import instances_apart
from forgetcast.tuners.anatomy import anatomy

KINDS = ("vit", "bert")
RANK, BLOCKS = 4, 2


def method(kind: str = "vit", **options) -> MOS:
    small = {"rank": RANK, "epochs": 2, "samples": 16, "contrast": 0.01}
    return MOS(pretrained(kind), WIDTH, **small | options)


def learnt(made: MOS, tasks: int, kind: str = "vit", epochs: int = 3) -> MOS:
    for index in range(tasks):
        task = task_of(stream(kind), index)
        made.begin_task(task)
        train(made, task, epochs)
        made.end_task(task)
    return made


@cache
def finished(kind: str) -> MOS:
    return learnt(method(kind), 3, kind)


def questions(kind: str) -> Tensor:
    return torch.cat([read(stream(kind), index)[0] for index in range(3)])


def asked(made: MOS, inputs: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(made.model):
        return made.predict(inputs)


def with_adapters(kind: str, adapters: nn.ModuleList) -> Pooled:
    """A transformer of its own with these adapters beside its feed-forward networks, which read what goes into them."""
    backbone, held = pretrained(kind), {}
    for block, adapter in zip(anatomy(backbone).blocks, adapters, strict=True):
        read_at, added_at = (backbone.get_submodule(name) for name in (block.middle or block.enter, block.leave))
        read_at.register_forward_pre_hook(lambda _, given, adapter=adapter: held.update({adapter: given[0]}))
        added_at.register_forward_hook(lambda _, __, found, adapter=adapter: found + adapter(held[adapter]))
    return backbone


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_trains_moves_and_no_other_bit(kind):
    made = method(kind)
    for index in range(3):
        task = task_of(stream(kind), index)
        made.begin_task(task)
        before = copied(made.model)
        train(made, task)
        after = copied(made.model)
        training = {name for name, value in made.model.named_parameters() if value.requires_grad}
        assert {name for name in after if not torch.equal(after[name], before[name])} == training
        assert {name for name in training if "backbone.newest." not in name} == {"head.weight", "head.bias"}
        assert len(training) == 4 * BLOCKS + 2
        made.end_task(task)
        settled = copied(made.model)
        moved = {name for name in settled if name in after and not torch.equal(settled[name], after[name])}
        statistics = {name for name in moved if name.startswith(("head.means.", "head.owner"))}
        assert moved - statistics == ({"head.weight", "head.bias"} if index else set())


@pytest.mark.parametrize("contrast", [0.0, 0.05])
def test_the_loss_is_over_the_classes_of_the_task_with_features_kept_apart(contrast):
    made = learnt(method(contrast=contrast), 1)
    task = task_of(stream("vit"), 1)
    made.begin_task(task)
    made.model.eval()
    (batch, *_) = task.batches()
    phi = made.network.current(batch.inputs)
    own = list(task.classes)
    places = torch.tensor([own.index(label) for label in batch.labels.tolist()])
    old = torch.stack([values["mean"] for values in made.gaussians.classes.values()]).float()
    assert old.shape == (2, WIDTH)
    expected = cross_entropy(made.head(phi)[:, own], places) + contrast * instances_apart(phi, old)
    torch.testing.assert_close(made.loss(batch), expected)


def test_a_step_is_merged_once_with_the_mean_of_all_earlier_adapters():
    made = learnt(method(momentum=0.25), 2)
    task = task_of(stream("vit"), 2)
    made.begin_task(task)
    assert all(map(torch.equal, made.network.newest.parameters(), made.network.settled[1].parameters()))
    optimizer = torch.optim.SGD(made.parameter_groups(), lr=0.1)
    for batch in task.batches():
        optimizer.zero_grad()
        made.loss(batch).backward()
        optimizer.step()
        stepped = [value.detach().clone() for value in made.network.newest.parameters()]
        made.after_step()
        means = [(a + b) / 2 for a, b in zip(*(one.parameters() for one in made.network.settled), strict=True)]
        for value, step, mean in zip(made.network.newest.parameters(), stepped, means, strict=True):
            torch.testing.assert_close(value, 0.75 * step + 0.25 * mean)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_measured_with_the_adapters_of_their_own_task(kind):
    made = finished(kind)
    for index in range(3):
        inputs, labels = read(stream(kind), index)
        with torch.no_grad():
            phi = with_adapters(kind, made.network.settled[index])(inputs).double()
            first = with_adapters(kind, made.network.settled[0])(inputs).double()
        for label in stream(kind)[index].classes:
            own, found = phi[labels == label], made.gaussians.classes[label]
            torch.testing.assert_close(found["mean"], own.mean(0), atol=1e-5, rtol=1e-5)
            covariance = own.T.cov() + JITTER * torch.eye(WIDTH, dtype=torch.float64)
            torch.testing.assert_close(found["root"] @ found["root"].T, covariance, atol=1e-4, rtol=1e-4)
            mean = first[labels == label].mean(0)
            torch.testing.assert_close(made.head.means.means[label], mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [1, 3])
def test_the_answer_is_that_of_its_equations_one_sample_at_a_time(kind, tasks):
    """Slowly, each set of adapters in a transformer of its own."""
    made = learnt(method(kind), tasks, kind)
    networks = [with_adapters(kind, adapters) for adapters in made.network.settled]
    outputs = 2 * tasks
    weight, bias = (value.detach().double() for value in (made.head.weight, made.head.bias))
    means = normalize(made.head.means.means)
    places = []
    for sample in questions(kind)[:8]:
        with torch.no_grad():
            phi = [network(sample[None])[0].double() for network in networks]
        cosines = means @ (phi[0] / phi[0].norm())
        place = int(cosines.argmax()) // 2
        for _ in range(4):
            logits = weight @ phi[place] + bias
            following, last = int(logits.argmax()) // 2, place
            place = following
            if following == last:
                break
        expected = (logits.softmax(0) + (tasks * cosines).softmax(0)).log()
        found = asked(made, sample[None])[0]
        assert len(found) == outputs
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
        places.append(last)
    assert (len(set(places)) > 1) == (tasks > 1)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_of_each_input_alone_and_however_often_they_are_asked_for(kind):
    made, inputs = finished(kind), questions(kind)
    before = copied(made.model)
    whole = asked(made, inputs)
    torch.testing.assert_close(torch.cat([asked(made, one) for one in inputs.split(1)]), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(asked(made, inputs.flip(0)).flip(0), whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(asked(made, inputs), whole)
    after = copied(made.model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_alignment_teaches_the_head_all_classes_from_their_gaussians():
    """Tasks without a step: the rows are zero until the head is aligned, which gives each class its mean."""
    made = learnt(method(samples=64, epochs=20, rate=0.05), 3, epochs=0)
    means = torch.stack([values["mean"] for values in made.gaussians.classes.values()]).float()
    assert torch.equal(made.head(means).argmax(1), torch.arange(6))
    assert not learnt(method(epochs=0), 3, epochs=0).head.weight.any()


def test_within_a_task_it_answers_as_at_the_end_of_the_one_before():
    made, inputs = method(), questions("vit")
    task = task_of(stream("vit"), 0)
    made.begin_task(task)
    assert (asked(made, inputs) == UNSEEN).all()
    train(made, task, 1)
    made.end_task(task)
    before, task = asked(made, inputs), task_of(stream("vit"), 1)
    made.begin_task(task)
    assert torch.equal(asked(made, inputs)[:, :2], before)
    assert (asked(made, inputs)[:, 2:] == UNSEEN).all()
