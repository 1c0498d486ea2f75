"""The progress of a run on a terminal: task, epoch, loss, accuracy, how long it will take, and what each task added."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from forgetcast.learn.progress import Step


class Bar:
    """Follows a run by its events and steps.

    Args:
        progress: draws the bar.
        tasks: of the stream.
        epochs: of each task.
    """

    def __init__(self, progress: Progress, tasks: int, epochs: int) -> None:
        self.progress = progress
        self.tasks = tasks
        self.epochs = epochs
        self.accuracy = ""
        self.bar: TaskID = progress.add_task(self._text(0), total=tasks)
        self.begun = False

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Take note of an accuracy; a method that takes no steps moves on by tasks."""
        if "accuracy" in event:
            self.accuracy = f"  accuracy {fmean(event['accuracy']):.1%}"
        if event["event"] == "task":
            following = min(event["task"] + 1, self.tasks - 1)
            self.progress.update(self.bar, description=self._text(following))
            if not self.begun:
                self.progress.update(self.bar, completed=event["task"] + 1)

    def on_step(self, step: Step) -> None:
        """Move on by one step; those of an interrupted run that is gone on with do not count as speed."""
        text = f"{self._text(step.task)}  epoch {step.epoch + 1}/{self.epochs}  loss {step.loss:.3g}"
        if not self.begun:
            self.begun = True
            self.progress.reset(self.bar, total=step.run_steps, completed=step.run_step - 1)
        self.progress.update(self.bar, completed=step.run_step, description=text + self.accuracy)

    def _text(self, task: int) -> str:
        return f"task {task + 1}/{self.tasks}"


def learnt_line(event: Mapping[str, Any], tasks: int, before: int | None) -> str:
    """What a task has come to, in one line: accuracy, numbers that trained, numbers stored and how many more these are.

    Args:
        event: the one at the end of the task.
        tasks: of the stream.
        before: numbers stored after the task before; None after the first.
    """
    stored = event["stored_numbers"]
    more = "" if before is None else f" ({stored - before:+,})"
    return (
        f"task {event['task'] + 1}/{tasks}: accuracy {fmean(event['accuracy']):.1%}, "
        f"{event['trainable_parameters']:,} numbers trained, {stored:,} stored{more}"
    )


@contextmanager
def progress_bar(console: Console | None, tasks: int, epochs: int) -> Iterator[Bar | None]:
    """A bar while the run lasts; None, and nothing is written, where there is no terminal."""
    if console is None or not console.is_terminal:
        yield None
        return
    with Progress(*_columns(), console=console, transient=True) as progress:
        yield Bar(progress, tasks, epochs)


@contextmanager
def counting_bar(console: Console | None, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """What is told how many further ones of `total` are done; a bar from the first of them on, on a terminal."""
    if console is None or not console.is_terminal:
        yield lambda _: None
        return
    with Progress(*_columns(), console=console, transient=True) as progress:
        bar = progress.add_task(what, total=total, visible=False)
        yield lambda count: progress.update(bar, advance=count, visible=True)


def _columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
