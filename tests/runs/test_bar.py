"""The bar says where a run is, on a terminal alone."""

from io import StringIO

from rich.console import Console

from forgetcast.learn.progress import Step
from forgetcast.runs.bar import learnt_line, progress_bar


def test_what_it_says_on_a_terminal():
    console = Console(file=StringIO(), force_terminal=True, width=120)
    with progress_bar(console, tasks=2, epochs=3) as bar:
        assert bar is not None
        (shown,) = bar.progress.tasks
        assert shown.description == "task 1/2"
        bar.on_step(Step(task=0, epoch=1, run_step=5, run_steps=12, loss=0.25))
        assert (shown.completed, shown.total) == (5, 12)
        assert shown.description == "task 1/2  epoch 2/3  loss 0.25"
        assert len(shown._progress) == 1  # the four steps before count for no speed
        bar.on_event({"event": "task", "task": 0, "accuracy": [0.5]})
        assert (shown.completed, shown.description) == (5, "task 2/2")
        bar.on_step(Step(task=1, epoch=0, run_step=7, run_steps=12, loss=0.5))
        assert shown.description == "task 2/2  epoch 1/3  loss 0.5  accuracy 50.0%"
        bar.on_event({"event": "evaluation", "task": 1, "accuracy": [0.5, 0.25]})
        bar.on_step(Step(task=1, epoch=2, run_step=12, run_steps=12, loss=0.125))
        assert shown.description == "task 2/2  epoch 3/3  loss 0.125  accuracy 37.5%"
        bar.progress.refresh()
    assert "task 2/2" in console.file.getvalue()


def test_a_method_without_steps_moves_on_by_tasks():
    with progress_bar(Console(file=StringIO(), force_terminal=True), tasks=3, epochs=1) as bar:
        assert bar is not None
        (shown,) = bar.progress.tasks
        for task in range(3):
            assert (shown.completed, shown.total) == (task, 3)
            bar.on_event({"event": "task", "task": task, "accuracy": [1.0]})
        assert shown.completed == 3


def test_quiet_where_there_is_no_terminal():
    console = Console(file=StringIO())
    for quiet in (console, None):
        with progress_bar(quiet, tasks=2, epochs=3) as bar:
            assert bar is None
    assert console.file.getvalue() == ""


def test_what_a_task_has_come_to():
    event = {"task": 1, "accuracy": [0.5, 0.25], "trainable_parameters": 1234, "stored_numbers": 56789}
    line = "task 2/3: accuracy 37.5%, 1,234 numbers trained, 56,789 stored"
    assert learnt_line(event, 3, None) == line
    assert learnt_line(event, 3, 55000) == f"{line} (+1,789)"
    assert learnt_line(event, 3, 57000) == f"{line} (-211)"
    assert learnt_line(event, 3, 56789) == f"{line} (+0)"
