"""A run brought to the beginning of one of its tasks, for what is said of the task before it trains."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from forgetcast.backbones.weights import weights_hash
from forgetcast.checks import complaint, require_integer
from forgetcast.learn.progress import finished_tasks
from forgetcast.runs.assembly import PRECISIONS, Assembly, assemble
from forgetcast.runs.bar import progress_bar
from forgetcast.runs.recipe import Recipe
from forgetcast.runs.record import provenance
from forgetcast.runs.upcoming import Upcoming, require_steps, upcoming


@dataclass(frozen=True, eq=False)
class Begun:
    """A run whose next task has begun and has not trained.

    Attributes:
        made: the run; its method has begun the task, so that the run itself cannot go on.
        ahead: the task.
        weights: hash of the model before the task.
    """

    made: Assembly
    ahead: Upcoming
    weights: str

    def record(self, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
        """What a record says of run and task, in plain JSON values. Tasks and outputs count from 0."""
        made, ahead, stream = self.made, self.ahead, self.made.stream
        return provenance() | {
            "kind": kind,
            **made.identity,
            "weights_hash": {"backbone_at_start": made.prepared.weights, "model_before_task": self.weights},
            "settings": settings,
            "scenario": stream.scenario,
            "task": ahead.index,
            "tasks": len(stream),
            "classes": class_names(made),
            "new_classes": list(stream[ahead.index].classes),
            "new_samples": len(ahead.new[1]),
            "old_samples": len(ahead.places),
            "steps": ahead.training.steps,
            "left_out": list(ahead.left_out),
        }


def begun(recipe: Recipe, root: Path, task: int | None, most_old: int, console: Console | None) -> Begun:
    """Learn the tasks before `task`, as far as the run has not come yet, and begin it.

    Args:
        recipe: of the run.
        root: the directory that holds the runs.
        task: counted from 0, at least 1; by default the one that the run comes to next, of a finished run the last.
        most_old: old samples, at most.
        console: for progress bars.

    Raises:
        ValueError: a method without gradient steps or with more than a forecast describes, a task that the stream does
            not have or that the run has passed, several processes, and whatever recipe and loop refuse.
    """
    require_integer("most_old", most_old, least=1)
    made = assembled(recipe, root, console)
    index = _task_of(made, task)
    require_steps(made.method, recipe.method.name, index)
    learn(made, index)
    weights = weights_hash(made.method.model.state_dict())
    return Begun(made, upcoming(made, index, most_old), weights)


def assembled(recipe: Recipe, root: Path, console: Console | None) -> Assembly:
    """The run, by one process."""
    accelerator = Accelerator(mixed_precision=PRECISIONS[recipe.training.precision])
    if accelerator.num_processes > 1:
        raise complaint(f"a forecast by {accelerator.num_processes} processes", "one", "Start it without a launcher.")
    return assemble(recipe, root, accelerator, console)


def learn(made: Assembly, until: int) -> None:
    """Bring the run to the end of task `until` - 1."""
    with progress_bar(made.screen, len(made.stream), made.recipe.training.epochs) as bar:
        made.learn(until=until, on_step=None if bar is None else bar.on_step)


def class_names(made: Assembly) -> list[str]:
    """Of the outputs, in their order."""
    names = made.stream.source.class_names
    return [str(label) if names is None else names[label] for label in made.stream.class_order]


def _task_of(made: Assembly, task: int | None) -> int:
    """The task that is meant: as asked for, or the next one of the run; of a finished run the last."""
    last = len(made.stream) - 1
    if last == 0:
        raise complaint("a stream of one task", "at least two", "Lower data.increment: nothing is old in the first.")
    if task is None:
        return min(max(finished_tasks(made.checkpoints), 1), last)
    if not 1 <= task <= last:
        raise complaint(
            f"got task={task}", f"a task from 1 to {last}", "Tasks count from 0; nothing is old in the first."
        )
    return task
