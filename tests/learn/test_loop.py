"""The loop: resumes bit for bit, saves before it stops, refuses what would go wrong silently."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from small import OPTIMIZATION, SMOOTH, Plain, noisy, plain, stream
from torch import nn

from forgetcast.backbones.weights import weights_hash
from forgetcast.heads.linear import Linear
from forgetcast.learn.loop import Checkpointing, Learnt, learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Model
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.variants import blurry

HERE = Path(__file__).parent


def ended(method) -> str:
    return weights_hash(method.model.state_dict())


def reproducible(done: Learnt) -> dict:
    """All that a resumed run must measure alike: not time, nor the memory of the process."""
    return {key: value for key, value in asdict(done).items() if not key.startswith(("seconds", "peak"))}


def test_killed_runs_end_as_whole_ones():
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "killed.py"), "8", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=240)
    result = json.loads(done.stdout)
    assert result["kills"] == 8
    assert all(result["same"])


@pytest.mark.parametrize("stop", [0, 7, 11, 35])
def test_interrupted_run_saves_first_and_goes_on(stop, tmp_path):
    news = {"evaluate_every": 5, "log_every": 4}  # due at other steps than the stops
    whole = plain()
    expected = learn(whole, stream(), OPTIMIZATION, seed=3, **news)
    checkpointing = Checkpointing(tmp_path)
    method, steps = plain(), []

    def after_step() -> None:
        Plain.after_step(method)
        steps.append(1)
        if len(steps) == stop + 1:
            os.kill(os.getpid(), signal.SIGINT)

    method.after_step = after_step
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        learn(method, stream(), OPTIMIZATION, seed=3, checkpointing=checkpointing, **news)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(steps) == stop + 1
    resumed = plain()
    seen = []
    result = learn(resumed, stream(), OPTIMIZATION, seed=3, checkpointing=checkpointing, on_event=seen.append, **news)
    assert ended(resumed) == ended(whole)
    assert reproducible(result) == reproducible(expected)
    assert seen == result.events
    again = learn(plain(), stream(), OPTIMIZATION, seed=3, checkpointing=checkpointing, **news)
    assert reproducible(again) == reproducible(expected)


def test_checkpoint_of_another_run_is_refused(tmp_path):
    learn(plain(), stream(), OPTIMIZATION, seed=3, checkpointing=Checkpointing(tmp_path))
    with pytest.raises(ValueError, match="expected a checkpoint of"):
        learn(plain(), stream(), OPTIMIZATION, seed=4, checkpointing=Checkpointing(tmp_path))


def test_it_learns_and_measures():
    method = plain(dropout=0)
    done = learn(method, stream(), Optimization(learning_rate=1e-2, epochs=8, batch_size=16), seed=0)
    assert [len(row) for row in done.accuracy_matrix] == [1, 2, 3]
    assert done.metrics["learning_accuracy"] > 0.95
    assert done.metrics["first_minus_last"] > 0.5  # nothing protects it
    rows = zip(done.accuracy_matrix, done.task_incremental_matrix, strict=True)
    assert all(told >= untold for row in rows for untold, told in zip(*row, strict=True))
    head = 24 * 64 + 24
    assert done.trainable_parameters == [head + 25 * outputs for outputs in (2, 4, 6)]
    assert [event["event"] for event in done.events].count("epoch") == 24


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_accuracy_does_not_depend_on_the_evaluation_batch(batch_size):
    from forgetcast.learn.evaluate import logits_of

    method = plain()
    learn(method, stream(), OPTIMIZATION, seed=3)

    def read(places):
        return torch.from_numpy(stream().source.inputs[places])

    test = stream()[0].test
    whole = logits_of(method, read, test, len(test), torch.device("cpu"))
    parts = logits_of(method, read, test[::-1].copy(), batch_size, torch.device("cpu")).flip(0)
    assert torch.allclose(whole, parts, atol=1e-6)


def test_parameter_that_the_loss_does_not_reach():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 8), nn.Linear(64, 8)

        def forward(self, inputs):
            return self.used(inputs)

    with pytest.raises(
        ValueError, match=r"the loss does not reach \['backbone.unused.weight', 'backbone.unused.bias'\]"
    ):
        learn(Plain(Model(Unused(), Linear(8, 1))), stream(), OPTIMIZATION)


def test_loss_that_is_not_finite():
    with pytest.raises(ValueError, match="the loss of task 0 is .*Lower the learning rate"):
        learn(plain(), stream(), Optimization(optimizer="sgd", learning_rate=1e38, batch_size=32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "adamw", "momentum": 0.9}, "momentum=0.9 with adamw"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": -1}, "epochs"),
    ],
)
def test_settings_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Optimization(**arguments)


def test_cosine_schedule_ends_at_zero():
    optimization = Optimization(learning_rate=2.0, schedule="cosine")
    optimizer = optimization.build([{"params": [nn.Parameter(torch.zeros(1))], "lr": 4.0}])
    rates = []
    for step in (0, 5, 10):
        optimization.set_rate(optimizer, step, 10)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([4, 2, 0])


@pytest.mark.parametrize("epochs", [1, 7])
def test_cosine_by_epoch_is_that_of_pytorch_stepped_after_each_epoch(epochs):
    optimization = Optimization("sgd", learning_rate=2.0, epochs=epochs, schedule="cosine_by_epoch")
    ours, theirs = (optimization.build([{"params": [nn.Parameter(torch.zeros(1))]}]) for _ in range(2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=epochs)
    for epoch in range(epochs):
        for step in range(5):
            optimization.set_rate(ours, 5 * epoch + step, 5 * epochs)
            assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
        theirs.step()
        schedule.step()


def test_two_processes_give_the_result_of_one(tmp_path):
    script = HERE / "two_processes.py"
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launch, str(script), str(tmp_path)], env=environment, check=False, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    method = plain(dropout=0)
    learn(method, stream(), SMOOTH, seed=3, read_training=noisy)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in method.model.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert torch.allclose(ranks[0][name], value, atol=1e-6), name


def test_blurry_and_online_streams():
    leaking = blurry(stream(), 0.3)
    done = learn(plain(dropout=0), leaking, OPTIMIZATION, seed=3)
    assert len(done.accuracy_matrix) == 3
    online = class_incremental(stream().source, 2, online=True)
    with pytest.raises(ValueError, match="4 epochs over an online stream"):
        learn(plain(dropout=0), online, OPTIMIZATION)
