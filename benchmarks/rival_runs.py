"""One run of a row of the table of rivals: its data, its training, and what is kept of it."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.projection_runs import Table
from benchmarks.projection_settings import SETTINGS, Cached, stream_of
from benchmarks.rival_rows import TASKS, Row
from forgetcast.learn.cost import peak_memory
from forgetcast.learn.loop import learn
from forgetcast.learn.seeding import seed_everything
from forgetcast.metrics.matrix import all_metrics
from forgetcast.streams.stream import Stream, Task

SAMPLES = {"vit": 16, "minilm": 12}
"""Training samples a class."""
TITLES = {
    "vit": "CIFAR-100: ViT-Tiny at 112 px, its last 3 of 12 blocks tuned",
    "minilm": "CLINC150: MiniLM at 16 tokens, its last 2 of 6 layers tuned",
}
CPU = torch.device("cpu")
Job = tuple[Row, float | None, int, bool, str]
"""Row, rate, seed, whether validation samples take the place of the test's, data set."""
inherited: dict[str, Any] = {}
"""What a worker was started with: the data and their folder."""


def begin(data: dict[str, Cached], folder: Path) -> None:
    """In a worker, before its run."""
    torch.set_num_threads(1)
    disable_progress_bar()
    inherited.update(data=data, folder=folder)


def cached_of(name: str, folder: Path) -> Cached:
    """The activations of a data set, of the first `SAMPLES` training samples of each class."""
    return fewer(SETTINGS[name].cached(folder), SAMPLES[name]).shared()


def fewer(cached: Cached, each: int) -> Cached:
    """The first so many training samples of each class, and all test samples."""
    there = torch.ones(len(cached.labels), dtype=torch.bool)
    there[cached.test] = False
    labels = cached.labels.clone()
    labels[cached.test] = -1
    for label in cached.labels.unique():
        there[torch.where(labels == label)[0][each:]] = False
    there[cached.test] = True
    tested = torch.zeros_like(there)
    tested[cached.test] = True
    kept = hashlib.sha256(f"{cached.hash}, {each} a class".encode()).hexdigest()
    places = torch.where(tested[there])[0]
    return Cached(cached.states[there], cached.labels[there], places, cached.groups, f"sha256:{kept}")


def merged(stream: Stream, tasks: int) -> Stream:
    """Neighbouring tasks put together, so that there are so many."""
    size = len(stream) // tasks
    parts = [stream.tasks[k : k + size] for k in range(0, len(stream), size)]
    return replace(stream, tasks=tuple(_together(some) for some in parts))


def _together(tasks: tuple[Task, ...]) -> Task:
    classes = tuple(output for task in tasks for output in task.classes)
    return Task(
        classes, *(np.concatenate([getattr(task, part) for task in tasks]) for part in ("train", "test", "validation"))
    )


def stream_at(cached: Cached, name: str, seed: int, *, validation: bool = False) -> Stream:
    """The tasks of a seed."""
    return merged(stream_of(cached, name, seed, validation=validation), TASKS)


def identity_of(job: Job, data: str) -> Any:
    """All that decides the numbers of a run, but for the code."""
    row, rate, seed, _, name = job
    decided = {**row.decided(name, rate, seed), "optimization": asdict(row.at(rate)), "tasks": TASKS, "data": data}
    return json.loads(json.dumps(decided))


def work(job: Job) -> tuple[Job, Table]:
    """In a worker: all that the page tells of a run; or why it failed, as a rate that is too high does."""
    started = process_time()
    try:
        found = measured(job)
    except (ValueError, RuntimeError) as error:
        nothing = {"average_accuracy": 0.0, "last_accuracy": 0.0}
        found = {"failed": str(error), "metrics": nothing, "identity": None}  # so that it is tried again
    return job, {**found, "cpu_seconds": process_time() - started}


def measured(job: Job) -> Table:
    """The run itself; its peak of memory is that of a process that does nothing else."""
    row, rate, seed, validation, name = job
    before = peak_memory(CPU)
    stream = stream_at(inherited["data"][name], name, seed, validation=validation)
    seed_everything(seed)
    method = row.made(name, SETTINGS[name], inherited["folder"], rate, seed)
    with quietly():
        done = learn(method, stream, row.at(rate), seed=seed)
    return {
        "metrics": all_metrics(done.accuracy_matrix),
        "accuracy_matrix": done.accuracy_matrix,
        "trainable_parameters": done.trainable_parameters,
        "stored_numbers": done.stored_numbers,
        "peak_memory": max(done.peak_memory) - before,
        "seconds": sum(done.seconds),
    }


@contextmanager
def quietly() -> Iterator[None]:
    """Without warnings of how few directions a projection leaves: forgetting and learning say what became of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* direction")
        yield
