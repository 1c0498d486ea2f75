"""One loop for all methods: tasks, epochs, steps, evaluation, checkpoints. Resumes inside a task, bit for bit.

Several processes (`torchrun`, `accelerate launch`) each take a share of every batch and average gradients before
`after_backward`, so a method sees the gradient of the whole batch wherever it runs.
"""

import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import current_thread, main_thread
from time import monotonic
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.learn.checkpoint import load_checkpoint, save_checkpoint
from forgetcast.learn.evaluate import Read, logits_of, scores
from forgetcast.learn.optimizer import Optimization
from forgetcast.learn.seeding import epoch_order, random_state, restore_random_state, seed_everything
from forgetcast.methods.base import Batch, Method, TaskData
from forgetcast.metrics.matrix import all_metrics
from forgetcast.streams.scenarios import Stream


@dataclass(frozen=True)
class Checkpointing:
    """When and where checkpoints are written; always at the end of a task.

    Args:
        folder: holds them.
        minutes: and after this many minutes within a task.
        steps: and after this many steps within a task, if given.
        keep: number of checkpoints that stay.
    """

    folder: Path
    minutes: float = 10.0
    steps: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        require_number("minutes", self.minutes)
        require_integer("keep", self.keep, least=1)
        if self.steps is not None:
            require_integer("steps", self.steps, least=1)


@dataclass(frozen=True)
class Learnt:
    """What a run over a stream measured.

    Attributes:
        accuracy_matrix: row t: class-incremental accuracy on tasks 0 .. t after training task t.
        task_incremental_matrix: the same with the task told, from the same logits.
        events: one dict for each epoch and each task, as they were reported.
        seconds: of training, for each task.
        trainable_parameters: while training, for each task.
        stored_numbers: numbers that the method keeps after each task (weights, buffers, statistics).
    """

    accuracy_matrix: list[list[float]]
    task_incremental_matrix: list[list[float]]
    events: list[dict[str, Any]]
    seconds: list[float]
    trainable_parameters: list[int]
    stored_numbers: list[int]

    @property
    def metrics(self) -> dict[str, float]:
        """Every average accuracy and forgetting (class-incremental), by the name of its definition."""
        return all_metrics(self.accuracy_matrix)


@dataclass
class _Progress:
    """Where the run stands; goes into checkpoints as it is."""

    task: int = 0
    step: int = 0
    begun: bool = False
    saved: int = 0
    loss: float = 0.0
    accuracy_matrix: list[list[float]] = field(default_factory=list)
    task_incremental_matrix: list[list[float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    trainable_parameters: list[int] = field(default_factory=list)
    stored_numbers: list[int] = field(default_factory=list)


def learn(
    method: Method,
    stream: Stream,
    optimization: Optimization,
    *,
    seed: int = 0,
    read: Read | None = None,
    checkpointing: Checkpointing | None = None,
    accelerator: Accelerator | None = None,
    on_event: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Learnt:
    """Train `method` over the tasks of `stream`, evaluating all tasks seen after each.

    Called again with the same arguments after a kill, it goes on where the newest checkpoint stands, and ends with the
    weights and accuracies of an uninterrupted run (bit for bit on a CPU). Ctrl-C saves first.

    Args:
        method: what learns; its model is moved to the accelerator's device.
        stream: the tasks.
        optimization: optimiser, epochs, batch size; closed-form methods use the batch size alone.
        seed: of the sample order and of all random draws.
        read: maps places in the source to inputs; the source's arrays as they are by default.
        checkpointing: where and when to save; None for never.
        accelerator: Hugging Face Accelerate's; a plain one by default.
        on_event: called with each event (an epoch, a task), on the main process. A resumed run reports the earlier ones
            again first, so that whoever writes them down starts from an empty page.

    Raises:
        ValueError: a checkpoint of another run, a loss that is no longer finite, a trainable parameter that the loss
            does not reach.
    """
    if stream.online and method.by_gradient and optimization.epochs != 1:
        raise complaint(
            f"got {optimization.epochs} epochs over an online stream",
            "one, because each sample is seen once",
            "Set epochs=1, or make the stream without online.",
        )
    accelerator = Accelerator() if accelerator is None else accelerator
    method.model.to(accelerator.device)
    run = _Run(method, stream, optimization, seed, read or _reader(stream), checkpointing, accelerator, on_event)
    seed_everything(seed)
    with run.interruptible():
        run.resume()
        while run.progress.task < len(stream):
            run.one_task()
    progress = run.progress
    return Learnt(
        progress.accuracy_matrix,
        progress.task_incremental_matrix,
        progress.events,
        progress.seconds,
        progress.trainable_parameters,
        progress.stored_numbers,
    )


class _Run:
    def __init__(
        self,
        method: Method,
        stream: Stream,
        optimization: Optimization,
        seed: int,
        read: Read,
        checkpointing: Checkpointing | None,
        accelerator: Accelerator,
        on_event: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.method = method
        self.stream = stream
        self.optimization = optimization
        self.seed = seed
        self.read = read
        self.checkpointing = checkpointing
        self.accelerator = accelerator
        self.on_event = on_event
        self.progress = _Progress()
        self.optimizer: torch.optim.Optimizer | None = None
        self.interrupted = False
        self.last_saved = monotonic()
        self.clock = monotonic()

    @property
    def owner(self) -> str:
        """What checkpoints of this run belong to."""
        parts = {
            "method": type(self.method).__qualname__,
            "protections": [type(protection).__qualname__ for protection in self.method.protections],
            "split": self.stream.split_hash,
            "optimization": asdict(self.optimization),
            "seed": self.seed,
        }
        return f"sha256:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"

    def one_task(self) -> None:
        progress, method = self.progress, self.method
        task = self.task_data()
        if not progress.begun:
            method.begin_task(task)
            progress.trainable_parameters.append(trainable_parameters(method))
            progress.seconds.append(0.0)
            progress.begun = True
        self.clock = monotonic()
        if method.by_gradient:
            self.train(task)
        method.end_task(task)
        progress.stored_numbers.append(stored_numbers(method.state_dict()))
        self.tick()
        self.evaluate(task)
        progress.task, progress.step, progress.begun, progress.loss = progress.task + 1, 0, False, 0.0
        self.optimizer = None
        self.save()

    def train(self, task: TaskData) -> None:
        progress, optimization, accelerator = self.progress, self.optimization, self.accelerator
        indices, labels = self.samples(task.index)
        epoch_steps = -(-len(indices) // optimization.batch_size)
        steps = optimization.epochs * epoch_steps
        if self.optimizer is None:
            self.optimizer = self.new_optimizer()
        self.method.model.train()
        order = torch.empty(0, dtype=torch.int64)
        first = True
        while progress.step < steps:
            epoch, place = divmod(progress.step, epoch_steps)
            if first or place == 0:
                order = epoch_order(len(indices), self.seed, task.index, epoch)
                first = False
            chosen = order[place * optimization.batch_size :][: optimization.batch_size]
            optimization.set_rate(self.optimizer, progress.step, steps)
            loss = self.one_step(self.batch(indices, labels, chosen), len(chosen))
            progress.loss += loss
            progress.step += 1
            if place + 1 == epoch_steps:
                event = {"event": "epoch", "task": task.index, "epoch": epoch, "loss": progress.loss / epoch_steps}
                self.report(event)
                progress.loss = 0.0
            self.save_if_due()
        accelerator.wait_for_everyone()

    def one_step(self, batch: Batch, rows: int) -> float:
        """One optimiser step on this process's share of a batch of `rows` samples; the loss over the whole batch."""
        accelerator, method = self.accelerator, self.method
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        share = len(batch.labels) / rows
        value = torch.zeros((), device=accelerator.device)
        if share > 0:
            with accelerator.autocast():
                loss = method.loss(batch) * share
            accelerator.backward(loss)
            value = loss.detach()
        if accelerator.num_processes > 1:
            value = accelerator.reduce(value, "sum")
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = accelerator.reduce(gradient, "sum")
        number = float(value)
        if not np.isfinite(number):
            raise complaint(
                f"the loss of task {self.progress.task} is {number} at step {self.progress.step}",
                "a finite loss",
                "Lower the learning rate, or look for NaN in the inputs.",
            )
        if self.progress.step == 0:
            self.check_reached()
        method.after_backward()
        self.optimizer.step()
        method.after_step()
        return number

    def check_reached(self) -> None:
        """Raise if a trainable parameter has no gradient: it would silently never train."""
        assert self.optimizer is not None
        names = {id(parameter): name for name, parameter in self.method.model.named_parameters()}
        lost = [
            names.get(id(parameter), "a parameter outside the model")
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is None
        ]
        if lost:
            raise complaint(
                f"the loss does not reach {lost}",
                "a gradient for every trainable parameter",
                "Freeze what is not used (requires_grad_(False)), or put it on the path of the loss.",
            )

    def evaluate(self, task: TaskData) -> None:
        progress, stream = self.progress, self.stream
        rows = []
        for earlier in stream.tasks[: task.index + 1]:
            device, size = self.accelerator.device, self.optimization.batch_size
            logits = logits_of(self.method, self.read, earlier.test, size, device)
            rows.append(scores(logits, torch.from_numpy(stream.outputs[earlier.test]), task.seen, earlier.classes))
        progress.accuracy_matrix.append([row.class_incremental for row in rows])
        progress.task_incremental_matrix.append([row.task_incremental for row in rows])
        self.report(
            {
                "event": "task",
                "task": task.index,
                "class_incremental_accuracy": progress.accuracy_matrix[-1],
                "task_incremental_accuracy": progress.task_incremental_matrix[-1],
                "trainable_parameters": progress.trainable_parameters[-1],
                "stored_numbers": progress.stored_numbers[-1],
            }
        )

    def samples(self, index: int) -> tuple[Int[np.ndarray, " n"], Int[Tensor, " n"]]:
        """Places in the source and outputs of the samples that task `index` trains on."""
        tasks = self.stream.tasks
        parts = [task.train for task in (tasks[: index + 1] if self.method.joint else tasks[index : index + 1])]
        indices = np.concatenate(parts)
        return indices, torch.from_numpy(self.stream.outputs[indices])

    def task_data(self) -> TaskData:
        index = self.progress.task
        tasks = self.stream.tasks
        indices, labels = self.samples(index)
        leaked = {int(output) for task in tasks[: index + 1] for output in np.unique(self.stream.outputs[task.train])}
        seen = tuple(sorted(leaked.union(*(task.classes for task in tasks[: index + 1]))))
        size = self.optimization.batch_size

        def batches() -> Iterator[Batch]:
            for start in range(0, len(indices), size):
                places = torch.arange(start, min(start + size, len(indices)))
                yield self.whole_batch(indices, labels, places)

        return TaskData(index, tasks[index].classes, seen, batches)

    def batch(self, indices: Int[np.ndarray, " n"], labels: Int[Tensor, " n"], chosen: Int[Tensor, " b"]) -> Batch:
        """This process's share of a batch."""
        return self.whole_batch(
            indices, labels, chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        )

    def whole_batch(
        self, indices: Int[np.ndarray, " n"], labels: Int[Tensor, " n"], chosen: Int[Tensor, " b"]
    ) -> Batch:
        places, device = indices[chosen.numpy()], self.accelerator.device
        return Batch(self.read(places).to(device), labels[chosen].to(device), torch.from_numpy(places).to(device))

    def new_optimizer(self) -> torch.optim.Optimizer:
        built = self.optimization.build(self.method.parameter_groups())
        prepared: torch.optim.Optimizer = self.accelerator.prepare_optimizer(built, device_placement=False)
        return prepared

    def report(self, event: dict[str, Any]) -> None:
        self.progress.events.append(event)
        if self.accelerator.is_main_process:
            self.on_event(event)

    def tick(self) -> None:
        """Add the seconds since the last tick to the task at hand."""
        now = monotonic()
        self.progress.seconds[-1] += now - self.clock
        self.clock = now

    def save_if_due(self) -> None:
        if self.checkpointing is None:
            if self.interrupted:
                raise KeyboardInterrupt
            return
        every = self.checkpointing.steps
        due = every is not None and self.progress.step % every == 0
        if due or self.interrupted or monotonic() - self.last_saved > 60 * self.checkpointing.minutes:
            self.tick()
            self.save()

    def save(self) -> None:
        if self.checkpointing is not None:
            self.progress.saved += 1
            state = {
                "progress": asdict(self.progress),
                "method": self.method.state_dict(),
                "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
                "random": random_state(),
            }
            if self.accelerator.is_main_process:
                folder, keep = self.checkpointing.folder, self.checkpointing.keep
                save_checkpoint(folder, self.progress.saved, state, owner=self.owner, keep=keep)
            self.accelerator.wait_for_everyone()
            self.last_saved = monotonic()
        if self.interrupted:
            raise KeyboardInterrupt

    def resume(self) -> None:
        found = None
        if self.checkpointing is not None:
            found = load_checkpoint(self.checkpointing.folder, owner=self.owner)
        if found is None:
            return
        _, state = found
        self.progress = _Progress(**state["progress"])
        self.method.load_state_dict(state["method"])
        self.method.model.to(self.accelerator.device)
        if state["optimizer"] is not None:
            self.optimizer = self.new_optimizer()
            self.optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"])
        if self.accelerator.is_main_process:
            for event in self.progress.events:
                self.on_event(event)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C sets a flag, acted upon after the step: saved first, then raised. A second one raises at once."""

        def handle(_: int, __: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        if current_thread() is not main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def trainable_parameters(method: Method) -> int:
    """Numbers that gradient steps move; 0 for a closed form."""
    return sum(p.numel() for p in method.model.parameters() if p.requires_grad) if method.by_gradient else 0


def stored_numbers(state: Any) -> int:
    """Numbers in all tensors of a state."""
    if isinstance(state, Tensor):
        return state.numel()
    values = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return sum(stored_numbers(value) for value in values)


def _reader(stream: Stream) -> Read:
    inputs = stream.source.inputs

    def read(indices: Int[np.ndarray, " _"]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(inputs[indices]))

    return read
