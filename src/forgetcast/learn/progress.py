"""Where a run stands, what it measured, and what it tells of each step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetcast.checks import complaint
from forgetcast.learn.checkpoint import load_checkpoint
from forgetcast.metrics.matrix import all_metrics
from forgetcast.metrics.transfer import average_anytime_accuracy, forward_transfer

Matrix = list[list[float]]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step, as it was taken.

    Attributes:
        task: at hand, 0 for the first.
        epoch: at hand, 0 for the first.
        run_step: steps of the whole run up to this one; a task that takes none counts as one.
        run_steps: steps that the whole run takes.
        loss: mean over the steps of this epoch so far.
    """

    task: int
    epoch: int
    run_step: int
    run_steps: int
    loss: float


@dataclass
class Progress:
    """Where the run stands; goes into checkpoints as it is. The attributes that `Learnt` has too are told there."""

    task: int = 0
    step: int = 0
    begun: bool = False
    saved: int = 0
    loss: float = 0.0
    recent_loss: float = 0.0
    recent_steps: int = 0
    accuracy_matrix: Matrix = field(default_factory=list)
    task_incremental_matrix: Matrix = field(default_factory=list)
    per_class_accuracy: list[list[float | None]] = field(default_factory=list)
    calibration_error: list[float] = field(default_factory=list)
    evaluations: Matrix = field(default_factory=list)
    accuracy_on_next_task: list[float | None] = field(default_factory=list)
    accuracy_before_training: list[float] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    seconds_evaluation: list[float] = field(default_factory=list)
    peak_memory: list[int] = field(default_factory=list)
    trainable_parameters: list[int] = field(default_factory=list)
    stored_numbers: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Learnt:
    """What a run over a stream measured. `forgetcast.metrics.definitions` says of every number what it is.

    Attributes:
        accuracy_matrix: row t: class-incremental accuracy on tasks 0 .. t after training task t.
        task_incremental_matrix: the same with the task told, from the same logits.
        per_class_accuracy: row t: accuracy of each output on the test samples of tasks 0 .. t, None without one; as
            the scenario lets a prediction choose.
        calibration_error: expected calibration error on the same samples after each task.
        evaluations: rows as those of the scenario's accuracy matrix, of every evaluation in order; without evaluations
            within a task (`evaluate_every`) none.
        accuracy_on_next_task: on task t + 1 just after task t; None where it has an output that was not seen before,
            and for the last.
        accuracy_before_training: on each task, of the untrained model; none at all where a later task brings new
            outputs, for a single task, and for a closed form, which predicts nothing before it has learnt.
        events: one dict for each epoch, each task, some steps and evaluations, as they were reported.
        seconds: of training, for each task.
        seconds_evaluation: of evaluation, for each task.
        peak_memory: bytes, for each task, measured as `peak_memory_definition` says.
        peak_memory_definition: "cuda_max_memory_allocated" or "peak_resident_set_size".
        trainable_parameters: while training, for each task.
        stored_numbers: numbers that the method keeps after each task (weights, buffers, statistics).
    """

    accuracy_matrix: Matrix
    task_incremental_matrix: Matrix
    per_class_accuracy: list[list[float | None]]
    calibration_error: list[float]
    evaluations: Matrix
    accuracy_on_next_task: list[float | None]
    accuracy_before_training: list[float]
    events: list[dict[str, Any]]
    seconds: list[float]
    seconds_evaluation: list[float]
    peak_memory: list[int]
    peak_memory_definition: str
    trainable_parameters: list[int]
    stored_numbers: list[int]

    @property
    def metrics(self) -> dict[str, float]:
        """Every average accuracy and forgetting (class-incremental), by the name of its definition."""
        return all_metrics(self.accuracy_matrix)

    @property
    def further_metrics(self) -> dict[str, float]:
        """What needs more than the matrix, as far as this run measured it: calibration, anytime accuracy, transfer."""
        found = {"expected_calibration_error": self.calibration_error[-1]}
        if self.evaluations:
            found["average_anytime_accuracy"] = average_anytime_accuracy(self.evaluations)
        if self.accuracy_before_training:
            ahead = [
                [*row, following]
                for row, following in zip(self.accuracy_matrix, self.accuracy_on_next_task, strict=True)
            ]
            found["forward_transfer"] = forward_transfer(ahead, self.accuracy_before_training)
        return found


def finished_tasks(folder: Path) -> int:
    """How many tasks the run has finished whose checkpoints are in `folder`; 0 where there is none."""
    found = load_checkpoint(folder, owner=None)
    return 0 if found is None else int(found[1]["progress"]["task"])


def checkpoint_within(folder: Path, owner: str, until: int) -> tuple[int, dict[str, Any]] | None:
    """The checkpoint to go on from to the end of `until` tasks; None where there is none.

    The newest; but of a run that has passed that end, the one of just then, with which nothing is left to train.

    Raises:
        ValueError: a run that has passed it and kept no checkpoint of it; as `load_checkpoint`.
    """
    newest = load_checkpoint(folder, owner=owner)
    if newest is None or _place(newest[1]) <= (until, False):
        return newest
    exact = load_checkpoint(folder, owner=owner, wanted=lambda state: _place(state) == (until, False))
    if exact is None:
        raise complaint(
            f"the run in {folder.parent} has passed the end of task {until - 1} and kept no checkpoint of it",
            f"a checkpoint with {until} tasks learnt, or a run that has not come so far",
            "Choose another root, where these tasks are trained anew.",
        )
    return exact


def _place(state: Mapping[str, Any]) -> tuple[int, bool]:
    """Where the run of a checkpoint stands: tasks finished, and whether the next has begun."""
    return state["progress"]["task"], state["progress"]["begun"]
