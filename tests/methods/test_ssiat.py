"""SSIAT through whole transformers, of images and of padded texts: what trains, where old classes go, what is kept."""

import io
import math
from functools import cache

import pytest
import torch
from small_runs import check_rows
from test_inflora import WIDTH, copied, pretrained, read, stream, task_of, train
from torch import Tensor
from torch.nn.functional import normalize

from forgetcast.backbones.huggingface import Pooled
from forgetcast.learn.cost import stored_numbers
from forgetcast.methods.base import Batch, TaskData
from forgetcast.methods.registry import create
from forgetcast.methods.ssiat import JITTER, SSIAT
from forgetcast.modes import evaluating
from forgetcast.streams.domains import domain_incremental
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.lora import LoRA

KINDS = ("vit", "bert")
ADAPTER = Adapter(rank=4, activation="relu", bias=True)


def tuned(kind: str, tuner=ADAPTER) -> Pooled:
    backbone = pretrained(kind)
    tuner.attach(backbone.model)
    return backbone


def method(kind: str = "vit", **options) -> SSIAT:
    backbone = tuned(kind)
    return SSIAT(backbone, WIDTH, **{"epochs": 2, "samples": 16, "bandwidth": 2.0} | options)


def features(made: SSIAT, inputs: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(made.model):
        return made.model.features(inputs)


def learnt(made: SSIAT, tasks: int, kind: str = "vit", epochs: int = 3) -> SSIAT:
    for index in range(tasks):
        task = task_of(stream(kind), index)
        made.begin_task(task)
        train(made, task, epochs)
        made.end_task(task)
    return made


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
        assert {name for name in training if ".adapter." not in name} == {"head.weight"}
        assert len(training) == 2 * 4 + 1
        old = [output for output in task.seen if output not in task.classes]
        # decay shortens old rows, and nothing turns them
        turned = normalize(after["head.weight"]) - normalize(before["head.weight"])
        assert turned[old].abs().sum() < 1e-5
        assert turned[list(task.classes)].abs().max() > 1e-3
        made.end_task(task)
        moved = {name for name, value in copied(made.model).items() if not torch.equal(value, after[name])}
        assert moved == ({"head.weight"} if index else set())


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_the_loss_is_of_cosines_among_the_classes_of_the_task(margin):
    made = learnt(method(margin=margin, scale=7.0), 1)
    task = task_of(stream("vit"), 1)
    made.begin_task(task)
    (batch, *_) = task.batches()
    cosines = normalize(made.model.features(batch.inputs)) @ normalize(made.model.head.weight).T
    total = 0.0
    for row, label in zip(cosines.tolist(), batch.labels.tolist(), strict=True):
        own = 7.0 * (row[label] - margin)
        others = sum(math.exp(7.0 * row[c]) for c in task.classes if c != label)
        total -= own - math.log(math.exp(own) + others)
    assert made.loss(batch).item() == pytest.approx(total / len(batch.labels), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_old_means_move_by_the_equation_and_new_ones_are_measured(kind, floor):
    """Slowly, in double precision, of what the network made of the new samples before and after the task."""
    made = learnt(method(kind, floor=floor), 1, kind)
    old = {label: dict(values) for label, values in made.gaussians.classes.items()}
    task = task_of(stream(kind), 1)
    inputs, labels = read(stream(kind), 1)
    before = features(made, inputs).double()
    made.begin_task(task)
    train(made, task)
    made.end_task(task)
    after = features(made, inputs).double()
    assert (after - before).norm() > 1e-2 * before.norm()
    for label, values in old.items():
        weights = [math.exp(-float((phi - values["mean"]).square().sum()) / 8) + floor for phi in before]
        moved = sum(w * delta for w, delta in zip(weights, after - before, strict=True)) / sum(weights)
        found = made.gaussians.classes[label]
        torch.testing.assert_close(found["mean"], values["mean"] + moved, atol=1e-6, rtol=1e-6)
        assert torch.equal(found["root"], values["root"])
    for label in task.classes:
        own, found = after[labels == label], made.gaussians.classes[label]
        torch.testing.assert_close(found["mean"], own.mean(0), atol=1e-6, rtol=1e-6)
        covariance = own.T.cov() + JITTER * torch.eye(WIDTH, dtype=torch.float64)
        torch.testing.assert_close(found["root"] @ found["root"].T, covariance, atol=1e-5, rtol=1e-5)


def test_where_nothing_moves_old_means_stay():
    made = learnt(method(), 1)
    old = {label: values["mean"] for label, values in made.gaussians.classes.items()}
    task = task_of(stream("vit"), 1)
    made.begin_task(task)
    made.end_task(task)
    assert all(torch.equal(made.gaussians.classes[label]["mean"], mean) for label, mean in old.items())


def test_no_sample_is_kept():
    """A class costs its row, mean and root, of however many samples; features of a task are gone when it ends."""
    sizes = {}
    for each in (4, 8):
        made, sizes[each] = method(), []
        for index in range(2):
            task = task_of(stream("vit", each), index)
            made.begin_task(task)
            assert ("before" in made.state_dict()) == (index > 0)
            made.end_task(task)
            sizes[each].append(stored_numbers(made.state_dict()))
    assert sizes[4] == sizes[8]
    assert sizes[4][1] - sizes[4][0] == 2 * (WIDTH + WIDTH + WIDTH**2)


def test_alignment_teaches_the_rows_of_all_classes_from_their_gaussians_alone():
    """Two tasks without a step: all rows are as they were drawn, and after alignment name the means of all classes."""
    made = learnt(method(samples=64, epochs=20, rate=0.05), 3, epochs=0)
    means = torch.stack([values["mean"] for values in made.gaussians.classes.values()]).float()
    assert torch.equal(made.model.head(means).argmax(1), torch.arange(6))
    untaught = learnt(method(epochs=0), 3, epochs=0)
    assert not torch.equal(untaught.model.head(means).argmax(1), torch.arange(6))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_within_a_task_is_the_whole_run(kind):
    whole, task = learnt(method(kind), 1, kind), task_of(stream(kind), 1)
    whole.begin_task(task)
    train(whole, task, 1)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    torch.manual_seed(77)
    resumed = method(kind)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for made in (whole, resumed):
        train(made, task, 2)
        made.end_task(task)
    ours, theirs = copied(whole.model), copied(resumed.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for label, values in whole.gaussians.classes.items():
        assert all(torch.equal(value, resumed.gaussians.classes[label][name]) for name, value in values.items())


@cache
def finished(kind: str) -> SSIAT:
    return learnt(method(kind), 2, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_an_answer_is_of_its_own_input(kind):
    check_rows(finished(kind), stream(kind))


def test_a_class_that_comes_again_is_measured_anew():
    one = stream("vit").source
    tasks = domain_incremental([one, one], seed=0, test_share=0.25)
    made = method()
    for index in range(2):
        task = task_of(tasks, index)
        made.begin_task(task)
        train(made, task, 1)
        made.end_task(task)
    inputs, labels = read(tasks, 1)
    phi = features(made, inputs).double()
    for label, values in made.gaussians.classes.items():
        torch.testing.assert_close(values["mean"], phi[labels == label].mean(0), atol=1e-6, rtol=1e-6)


def test_a_sample_of_another_task_is_refused():
    made = method()
    made.begin_task(task_of(stream("vit"), 0))
    inputs, labels = read(stream("vit"), 1)
    with pytest.raises(ValueError, match=r"samples of outputs \[2, 3\] in a task that brings \[0, 1\]"):
        made.loss(Batch(inputs, labels, labels))


def test_any_tuner_will_do():
    pytest.importorskip("peft")
    made = learnt(SSIAT(tuned("vit", LoRA(rank=2)), WIDTH, epochs=1, samples=8), 2)
    assert made.predict(read(stream("vit"), 0)[0]).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale=0.0"),
        ({"margin": -0.1}, "margin=-0.1"),
        ({"bandwidth": 0.0}, "bandwidth=0.0"),
        ({"floor": -1.0}, "floor=-1.0"),
        ({"rate": -1.0}, "rate=-1.0"),
        ({"epochs": -1}, "epochs=-1"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SSIAT(tuned("vit"), WIDTH, **options)


def test_a_frozen_backbone_is_refused():
    with pytest.raises(ValueError, match="SSIAT on a backbone of which nothing trains.*Add one"):
        create("ssiat", pretrained("vit").requires_grad_(False), WIDTH)


def test_a_task_without_batches_is_refused():
    made = method()
    made.begin_task(TaskData(0, (0, 1), (0, 1), lambda: iter([])))
    with pytest.raises(ValueError, match="a task without batches"):
        made.end_task(TaskData(0, (0, 1), (0, 1), lambda: iter([])))
