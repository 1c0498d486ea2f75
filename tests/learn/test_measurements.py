"""What a run tells while it lasts and measures beyond the accuracy matrix."""

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small import OPTIMIZATION, Plain, plain, stream
from torch.nn.functional import scaled_dot_product_attention, softmax

from forgetcast.backbones.weights import weights_hash
from forgetcast.learn.attention import PlainAttention
from forgetcast.learn.cost import peak_memory
from forgetcast.learn.evaluate import logits_of, per_class, scores
from forgetcast.learn.loop import Checkpointing, learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.registry import create
from forgetcast.metrics.predictions import expected_calibration_error, per_class_accuracy
from forgetcast.streams.domains import domain_incremental
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import Source, digits

CPU = torch.device("cpu")
EPOCHS = [-(-len(task.train) // OPTIMIZATION.batch_size) for task in stream().tasks]  # steps of one, for each task


@pytest.fixture
def bfloat16():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda: Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def domains():
    whole = digits()
    kept = (whole.labels < 3).nonzero()[0][:180]
    parts = [Source(f"part{i}", whole.inputs[rows] + i, whole.labels[rows]) for i, rows in enumerate((kept, kept))]
    return domain_incremental(parts, seed=1)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_attention_goes_the_plain_way_in_steps_of_bfloat16_alone(bfloat16, precision):
    parts = [torch.randn(2, 1, 30, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    fused = scaled_dot_product_attention(*parts)
    with PlainAttention():
        plain_way = scaled_dot_product_attention(*parts)
    assert not torch.equal(plain_way, fused)
    method, found = plain(dropout=0), []
    inner = method.loss

    def loss(batch):
        found.append(scaled_dot_product_attention(*parts))
        return inner(batch)

    method.loss = loss
    accelerator = bfloat16() if precision == "bf16" else Accelerator(cpu=True)
    learn(method, stream(), OPTIMIZATION, seed=3, until=1, accelerator=accelerator)
    assert all(torch.equal(one, plain_way if precision == "bf16" else fused) for one in found)
    assert torch.equal(scaled_dot_product_attention(*parts), fused)


def test_news_of_steps():
    steps, losses = [], []
    method = plain(dropout=0)
    inner = method.loss

    def loss(batch):
        value = inner(batch)
        losses.append(value.item())
        return value

    method.loss = loss
    done = learn(method, stream(), OPTIMIZATION, seed=3, log_every=5, on_step=steps.append)
    assert [step.run_step for step in steps] == list(range(1, len(losses) + 1))
    assert {step.run_steps for step in steps} == {len(losses)}
    assert [(step.task, step.epoch) for step in steps] == [
        (task, epoch) for task, size in enumerate(EPOCHS) for epoch in range(4) for _ in range(size)
    ]
    for index, step in enumerate(steps):
        place = sum((other.task, other.epoch) == (step.task, step.epoch) for other in steps[:index])
        assert step.loss == pytest.approx(np.mean(losses[index - place : index + 1]))
    logged = [event for event in done.events if event["event"] == "step"]
    starts = [0, 4 * EPOCHS[0], 4 * sum(EPOCHS[:2])]
    places = [start + step for start, size in zip(starts, EPOCHS, strict=True) for step in range(5, 4 * size + 1, 5)]
    assert [event["run_step"] for event in logged] == places
    for event, place in zip(logged, places, strict=True):
        assert event["loss"] == pytest.approx(np.mean(losses[place - 5 : place]))
    assert [event["run_step"] for event in done.events] == sorted(event["run_step"] for event in done.events)


def test_a_closed_form_takes_one_step_a_task():
    steps = []
    done = learn(create("ncm", torch.nn.Identity(), 64), stream(), OPTIMIZATION, on_step=steps.append)
    assert steps == []
    assert [event["run_step"] for event in done.events] == [1, 2, 3]
    with pytest.raises(ValueError, match="got evaluate_every=3 with NCM; expected a method that takes steps"):
        learn(create("ncm", torch.nn.Identity(), 64), stream(), OPTIMIZATION, evaluate_every=3)


def test_evaluations_within_tasks_change_nothing_and_are_averaged():
    seldom, often = plain(), plain()
    expected = learn(seldom, stream(), OPTIMIZATION, seed=3)
    done = learn(often, stream(), OPTIMIZATION, seed=3, evaluate_every=4)
    assert weights_hash(often.model.state_dict()) == weights_hash(seldom.model.state_dict())
    assert done.accuracy_matrix == expected.accuracy_matrix
    assert expected.evaluations == []
    # every fourth step, the last of a task being its end
    assert [len(row) for row in done.evaluations] == [t for t, size in enumerate(EPOCHS, start=1) for _ in range(size)]
    assert [done.evaluations[sum(EPOCHS[: t + 1]) - 1] for t in range(3)] == done.accuracy_matrix
    within = [event["accuracy"] for event in done.events if event["event"] in ("evaluation", "task")]
    assert within == done.evaluations
    anytime = np.mean([np.mean(row) for row in done.evaluations])
    assert done.further_metrics["average_anytime_accuracy"] == pytest.approx(anytime)
    assert "average_anytime_accuracy" not in expected.further_metrics


@pytest.mark.parametrize("told", [False, True])
def test_classes_and_calibration_are_those_of_the_scenario(told):
    base = stream()
    source = class_incremental(base.source, 2, class_order=base.class_order, task_incremental=told, seed=1)
    method = plain(dropout=0)
    done = learn(method, source, OPTIMIZATION, seed=3)
    logits, labels = [], []
    for task in source.tasks:
        rows = logits_of(method, lambda places: torch.from_numpy(source.source.inputs[places]), task.test, 7, CPU)
        if told:
            rows[:, [c for c in range(6) if c not in task.classes]] = -1e9
        logits.append(rows)
        labels.append(torch.from_numpy(source.outputs[task.test]))
    logits, labels = torch.cat(logits), torch.cat(labels)
    assert done.per_class_accuracy[-1] == pytest.approx(list(per_class_accuracy(logits, labels).values()))
    assert done.calibration_error[-1] == pytest.approx(expected_calibration_error(logits, labels))
    assert [sum(value is not None for value in row) for row in done.per_class_accuracy] == [2, 4, 6]
    matrix = done.task_incremental_matrix if told else done.accuracy_matrix
    right = [share * len(task.test) for share, task in zip(matrix[-1], source.tasks, strict=True)]
    counts = torch.bincount(labels).tolist()
    assert sum(np.multiply(done.per_class_accuracy[-1], counts)) == pytest.approx(sum(right))


def test_an_output_that_a_method_does_not_know_yet_is_never_chosen():
    logits = torch.tensor([[2.0, 1.0], [-5.0, -6.0]])
    row = scores(logits, torch.tensor([0, 2]), seen=(0, 1, 2), own=(2,))
    assert (row.class_incremental, row.task_incremental) == (0.5, 0.5)
    assert torch.equal(row.right, torch.tensor([True, False]))
    assert torch.allclose(row.confidence, softmax(logits.double(), 1)[:, 0])
    assert per_class([row], 4) == [1.0, None, 0.0, None]
    with pytest.raises(ValueError, match="logits of shape .* holds nan"):
        scores(torch.tensor([[torch.nan, 0.0]]), torch.tensor([0]), seen=(0, 1), own=(0, 1))


def test_forward_transfer_is_measured_where_the_head_has_the_outputs():
    two = domains()
    method = plain(dropout=0)
    read = []

    class Watched(Plain):
        def begin_task(self, task) -> None:
            rows = []
            for other in two.tasks if self.model.head.outputs >= 3 else ():
                inputs = torch.from_numpy(two.source.inputs[other.test])
                guesses = self.model.eval()(inputs).argmax(1)
                rows.append(float((guesses == torch.from_numpy(two.outputs[other.test])).double().mean()))
            read.append(rows)
            super().begin_task(task)

    done = learn(Watched(method.model), two, OPTIMIZATION, seed=3)
    untrained, after_first = read
    assert done.accuracy_before_training == pytest.approx(untrained)
    assert done.accuracy_on_next_task == [pytest.approx(after_first[1]), None]
    assert done.further_metrics["forward_transfer"] == pytest.approx(after_first[1] - untrained[1])
    assert done.further_metrics["forward_transfer"] > 0.3  # the second domain is nearly the first


def test_no_forward_transfer_where_it_is_not_defined():
    new_classes = learn(plain(), stream(), OPTIMIZATION, seed=3)
    closed = learn(create("ncm", torch.nn.Identity(), 64), domains(), OPTIMIZATION)
    assert new_classes.accuracy_on_next_task == [None, None, None]
    assert new_classes.accuracy_before_training == closed.accuracy_before_training == []
    assert closed.accuracy_on_next_task[0] > 0.5
    for done in (new_classes, closed):
        assert set(done.further_metrics) == {"expected_calibration_error"}


def test_time_and_memory_of_each_task():
    done = learn(plain(), stream(), OPTIMIZATION, seed=3)
    assert len(done.seconds) == len(done.seconds_evaluation) == len(done.peak_memory) == 3
    assert min(done.seconds) > 0
    assert min(done.seconds_evaluation) > 0
    assert done.peak_memory_definition == "peak_resident_set_size"
    assert done.peak_memory == sorted(done.peak_memory)
    assert psutil.Process().memory_info().rss <= peak_memory(CPU) < psutil.virtual_memory().total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_memory_of_a_gpu_is_that_of_its_tensors():
    method = plain()
    torch.ones(50_000_000, device="cuda")  # before the run, and gone: no part of its peak
    done = learn(method, stream(), OPTIMIZATION, seed=3)
    weights = sum(value.numel() * value.element_size() for value in method.model.state_dict().values())
    assert done.peak_memory_definition == "cuda_max_memory_allocated"
    assert all(weights < peak < 100_000_000 for peak in done.peak_memory)


def test_bfloat16_learns_and_resumes_bit_for_bit(bfloat16, tmp_path):
    optimization = Optimization(learning_rate=1e-2, epochs=6, batch_size=32)
    kinds = set()

    class Watched(Plain):
        def loss(self, batch):
            kinds.add(self.model.backbone[0](batch.inputs).dtype)
            return super().loss(batch)

    whole = Watched(plain().model)
    done = learn(whole, stream(), optimization, seed=3, accelerator=bfloat16())
    assert kinds == {torch.bfloat16}
    assert done.metrics["learning_accuracy"] > 0.9
    assert all(value.dtype != torch.bfloat16 for value in whole.model.state_dict().values())
    full = plain()
    method, steps = plain(), []

    def stop() -> None:
        Plain.after_step(method)
        steps.append(1)
        if len(steps) == 20:
            raise KeyboardInterrupt

    method.after_step = stop
    checkpointing = Checkpointing(tmp_path, steps=7)
    with pytest.raises(KeyboardInterrupt):
        learn(method, stream(), optimization, seed=3, accelerator=bfloat16(), checkpointing=checkpointing)
    resumed = plain()
    learn(resumed, stream(), optimization, seed=3, accelerator=bfloat16(), checkpointing=checkpointing)
    assert weights_hash(resumed.model.state_dict()) == weights_hash(whole.model.state_dict())
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="expected a checkpoint of"):  # the precision is part of what it belongs to
        learn(full, stream(), optimization, seed=3, accelerator=Accelerator(cpu=True), checkpointing=checkpointing)


def test_precision_that_scales_the_loss_is_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda _: "fp16"))
    with pytest.raises(ValueError, match="got mixed precision fp16; expected bf16, or none. Use bf16"):
        learn(plain(), stream(), OPTIMIZATION, accelerator=accelerator)
