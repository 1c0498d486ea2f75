"""Experiment trackers by name, through Hugging Face Accelerate: TensorBoard, Weights & Biases, MLflow and the others.

A tracker of one's own is known by its name after `accelerate.tracking.register_tracker_class`.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from forgetcast.checks import complaint, require_choice
from forgetcast.runs.keys import flatten

PROJECT = "forgetcast"


def require_trackers(names: Sequence[str]) -> None:
    """Raise unless every name is a tracker whose package is installed."""
    own = set(LOGGER_TYPE_TO_CLASS) - set(LoggerType.list())
    here = {str(tracker) for tracker in get_available_trackers()} | own
    for name in names:
        require_choice("tracker", name, sorted(LOGGER_TYPE_TO_CLASS))
        if name not in here:
            raise complaint(
                f"got tracker={name!r}, whose package is not installed",
                f"one of those that are: {sorted(here)}",
                f"Install it (pip install {name}), or leave the tracker out.",
            )


def tracked_accelerator(names: Sequence[str], folder: Path, **options: Any) -> Accelerator:
    """An accelerator that logs to trackers; those that write files write them into `folder`/trackers.

    Args:
        names: of the trackers.
        folder: of the run; files of trackers there are removed, as a run that goes on reports its events again.
        **options: of the accelerator.

    Raises:
        ValueError: an unknown tracker, or one whose package is not installed.
    """
    require_trackers(names)
    files = folder / "trackers"
    accelerator = Accelerator(log_with=list(names) or None, project_dir=str(files), **options)
    if accelerator.is_main_process:
        shutil.rmtree(files, ignore_errors=True)
    return accelerator


@contextmanager
def tracking(
    accelerator: Accelerator, run_name: str, config: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Log a run's events to the accelerator's trackers, which are finished at the end, also on an error.

    Args:
        accelerator: with trackers (its `log_with`); without any, nothing happens.
        run_name: what Weights & Biases and MLflow call the run.
        config: what the run was asked for, a nested mapping; logged flat.

    Yields:
        What takes the events of `learn`. The step of an entry is the event's `run_step`.
    """
    if not accelerator.log_with:
        yield lambda _: None
        return
    plain = {key: _plain(value) for key, value in flatten(config).items()}
    options = {"wandb": {"name": run_name}, "mlflow": {"run_name": run_name}}
    accelerator.init_trackers(PROJECT, config=plain, init_kwargs=options)

    def track(event: Mapping[str, Any]) -> None:
        if values := tracked_values(event):
            accelerator.log(values, step=event["run_step"])

    try:
        yield track
    finally:
        # Not end_training, which would also end the process group that the next seed needs.
        for tracker in accelerator.trackers:
            assert isinstance(tracker, GeneralTracker)
            tracker.finish()
        accelerator.trackers.clear()


def tracked_values(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event, by the names that trackers show."""
    kind = event["event"]
    if kind in ("step", "epoch"):
        return {f"loss/{kind}": event["loss"]}
    if kind == "decision":
        return {f"decision/{key}": value for key, value in event.items() if isinstance(value, float)}
    accuracies = event["accuracy"]
    values = {"accuracy/mean": fmean(accuracies)}
    values |= {f"accuracy/task_{index}": accuracy for index, accuracy in enumerate(accuracies)}
    if kind == "task":
        values |= {key: event[key] for key in ("calibration_error", "trainable_parameters", "stored_numbers")}
    return values


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
