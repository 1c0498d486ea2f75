"""Trackers by name: what they are given, that they are finished, and what is said when one is not there."""

from importlib.util import find_spec

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from click.testing import CliRunner

from forgetcast.cli import main
from forgetcast.runs.metrics_log import read_metrics
from forgetcast.runs.trackers import require_trackers, tracked_accelerator, tracked_values, tracking

STEP = {"event": "step", "run_step": 3, "loss": 0.5}
TASK = {
    "event": "task",
    "run_step": 6,
    "accuracy": [0.5, 1.0],
    "calibration_error": 0.125,
    "trainable_parameters": 7,
    "stored_numbers": 9,
}
LOGGED = {
    "accuracy/mean": 0.75,
    "accuracy/task_0": 0.5,
    "accuracy/task_1": 1.0,
    "calibration_error": 0.125,
    "trainable_parameters": 7,
    "stored_numbers": 9,
}


class Own(GeneralTracker):
    """A tracker of one's own, which keeps what it is given."""

    name = "own"
    requires_logging_directory = False
    tracker = None

    def __init__(self, project: str = "", **options):
        super().__init__()
        self.project, self.calls, self.ended = project, [], 0

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **more):
        self.calls.append((step, values))

    def finish(self):
        self.ended += 1


def test_a_tracker_given_in_python_sees_every_event():
    own = Own()
    with tracking(Accelerator(log_with=own), "a run", {"training": {"epochs": 2, "order": [1, 2]}}) as track:
        track(STEP)
        track(TASK)
    assert own.config == {"training.epochs": 2, "training.order": "[1, 2]"}
    assert own.calls == [(3, {"loss/step": 0.5}), (6, LOGGED)]
    assert own.ended == 1


def test_a_tracker_is_finished_when_the_run_fails():
    own = Own()
    with pytest.raises(RuntimeError, match="stop"), tracking(Accelerator(log_with=own), "a run", {}):
        raise RuntimeError("stop")
    assert own.ended == 1


def test_values_of_every_kind_of_event():
    assert tracked_values({"event": "epoch", "run_step": 4, "loss": 0.25}) == {"loss/epoch": 0.25}
    assert tracked_values(TASK) == LOGGED
    within = {"event": "evaluation", "run_step": 5, "accuracy": [0.5]}
    assert tracked_values(within) == {"accuracy/mean": 0.5, "accuracy/task_0": 0.5}


def test_no_tracker_costs_nothing(tmp_path):
    with tracking(tracked_accelerator([], tmp_path), "a run", {}) as track:
        track(STEP)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_there_is_named_with_its_remedy(monkeypatch):
    with pytest.raises(ValueError, match="got tracker='tensorbord'.*Did you mean 'tensorboard'"):
        require_trackers(["tensorbord"])
    monkeypatch.setattr("forgetcast.runs.trackers.get_available_trackers", list)
    with pytest.raises(
        ValueError, match=r"got tracker='wandb', whose package is not installed; expected one of .*pip install wandb"
    ):
        require_trackers(["wandb"])


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "data: {source: digits, increment: 5}\nmodel: {backbone: mlp:8}\nmethod: {name: sequential}\n"
        "training: {epochs: 2, learning_rate: 0.01}\n"
    )
    return path


def type_in(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_registered_tracker_is_known_by_its_name(recipe_file, tmp_path, monkeypatch):
    made = []

    class Registered(Own):
        def __init__(self, project: str, **options):
            super().__init__(project, **options)
            made.append(self)

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "own", Registered)
    plain = type_in("run", recipe_file, "--root", tmp_path / "runs")
    done = type_in("run", recipe_file, "--root", tmp_path / "runs", "--tracker", "own")
    assert (plain.exit_code, done.exit_code) == (0, 0), done.output
    (folder,) = (tmp_path / "runs").glob("small-*")  # the tracker is no part of what the recipe's run is
    (own,) = made
    assert own.project == "forgetcast"
    assert own.config["method.name"] == "sequential"
    events = read_metrics(folder / "metrics.jsonl")
    assert own.calls == [(event["run_step"], tracked_values(event)) for event in events]
    assert own.ended == 1


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_holds_the_run_once_though_it_was_run_twice(recipe_file, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        done = type_in("run", recipe_file, "trackers=[tensorboard]", "--root", tmp_path / "runs")
        assert done.exit_code == 0, done.output
    (folder,) = (tmp_path / "runs").glob("small-*")
    board = EventAccumulator(str(folder / "trackers" / "forgetcast"))
    board.Reload()
    tasks = [event for event in read_metrics(folder / "metrics.jsonl") if event["event"] == "task"]
    shown = [(scalar.step, scalar.value) for scalar in board.Scalars("accuracy/mean")]
    assert shown == [(task["run_step"], pytest.approx(sum(task["accuracy"]) / len(task["accuracy"]))) for task in tasks]
