"""One loop for all methods: tasks, epochs, steps, evaluation, checkpoints. Resumes inside a task, bit for bit.

Several processes (`torchrun`, `accelerate launch`) each take a share of every batch and average gradients before
`after_backward`, so a method sees the gradient of the whole batch wherever it runs.
"""

import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import accumulate
from threading import current_thread, main_thread
from time import monotonic
from types import FrameType
from typing import Any, Literal

import torch
from accelerate import Accelerator

from forgetcast.checks import complaint, require_integer
from forgetcast.learn.checkpoint import Checkpointing as Checkpointing
from forgetcast.learn.checkpoint import save_checkpoint
from forgetcast.learn.cost import peak_memory, peak_memory_definition, start_peak_memory, trainable_parameters
from forgetcast.learn.cost import stored_numbers as stored_numbers
from forgetcast.learn.evaluate import Evaluator, Read, calibration, per_class
from forgetcast.learn.optimizer import Optimization
from forgetcast.learn.progress import Learnt as Learnt
from forgetcast.learn.progress import Progress, Step, checkpoint_within
from forgetcast.learn.samples import ReadTraining, Samples
from forgetcast.learn.seeding import epoch_order, random_state, restore_random_state, seed_everything
from forgetcast.learn.step import require_precision, take_step
from forgetcast.methods.base import Method, TaskData
from forgetcast.modes import training_mode
from forgetcast.streams.scenarios import Stream

LOG_EVERY = 50


def learn(
    method: Method,
    stream: Stream,
    optimization: Optimization,
    *,
    seed: int = 0,
    read: Read | None = None,
    read_training: ReadTraining | None = None,
    checkpointing: Checkpointing | None = None,
    accelerator: Accelerator | None = None,
    evaluate_every: int | None = None,
    log_every: int = LOG_EVERY,
    until: int | None = None,
    on_event: Callable[[Mapping[str, Any]], None] = lambda _: None,
    on_step: Callable[[Step], None] | None = None,
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
        read_training: the same for the batches of steps alone, where these are augmented at random: maps places, and
            for each a generator, to inputs. What a sample draws from is a function of seed, task, epoch and place.
        checkpointing: where and when to save; None for never.
        accelerator: Hugging Face Accelerate's; a plain one by default. With bf16 the loss is computed in mixed
            precision; evaluation is in full precision.
        evaluate_every: also evaluate all tasks seen after so many steps within a task, for the average anytime
            accuracy.
        log_every: report the mean loss after so many steps within a task.
        until: stop once so many tasks are learnt; all by default. The same run goes on from there later, and where it
            already has, the checkpoint of that moment is taken and nothing is trained.
        on_event: called with each event (some steps, an epoch, an evaluation, a task), on the main process. A resumed
            run reports the earlier ones again first, so that whoever writes them down starts from an empty page.
        on_step: called after every step, on the main process; nothing is reported again.

    Raises:
        ValueError: a checkpoint of another run, a run that has passed `until` and kept no checkpoint of that moment, a
            loss that is no longer finite, a trainable parameter that the loss does not reach, evaluations within the
            tasks of a closed form, mixed precision that scales losses.
    """
    if stream.online and method.by_gradient and optimization.epochs != 1:
        raise complaint(
            f"got {optimization.epochs} epochs over an online stream",
            "one, because each sample is seen once",
            "Set epochs=1, or make the stream without online.",
        )
    require_integer("log_every", log_every, least=1)
    if evaluate_every is not None:
        require_integer("evaluate_every", evaluate_every, least=1)
        if not method.by_gradient:
            raise complaint(
                f"got evaluate_every={evaluate_every} with {type(method).__name__}",
                "a method that takes steps",
                "Leave evaluate_every out: a closed form learns at the end of a task.",
            )
    until = len(stream) if until is None else until
    require_integer("until", until, least=1)
    if until > len(stream):
        raise complaint(f"got until={until}", f"at most the stream's {len(stream)} tasks", "Leave it out for all.")
    accelerator = Accelerator() if accelerator is None else accelerator
    require_precision(accelerator)
    method.model.to(accelerator.device)
    run = _Run(
        method,
        stream,
        optimization,
        seed,
        read,
        read_training,
        checkpointing,
        accelerator,
        evaluate_every,
        log_every,
        on_event,
        on_step,
    )
    seed_everything(seed)
    with run.interruptible():
        run.resume(until)
        while run.progress.task < until:
            run.one_task()
    return run.learnt()


class _Run:
    def __init__(
        self,
        method: Method,
        stream: Stream,
        optimization: Optimization,
        seed: int,
        read: Read | None,
        read_training: ReadTraining | None,
        checkpointing: Checkpointing | None,
        accelerator: Accelerator,
        evaluate_every: int | None,
        log_every: int,
        on_event: Callable[[Mapping[str, Any]], None],
        on_step: Callable[[Step], None] | None,
    ) -> None:
        self.method = method
        self.stream = stream
        self.optimization = optimization
        self.seed = seed
        self.checkpointing = checkpointing
        self.accelerator = accelerator
        self.evaluate_every = evaluate_every
        self.log_every = log_every
        self.on_event = on_event
        self.on_step = on_step if accelerator.is_main_process else None
        self.samples = Samples(
            stream, read, read_training, joint=method.joint, batch_size=optimization.batch_size, accelerator=accelerator
        )
        self.evaluator = Evaluator(method, stream, self.samples.read, optimization.batch_size, accelerator.device)
        steps = [self.steps(index) for index in range(len(stream))]
        self.starts = [0, *accumulate(max(1, count) for count in steps)]
        self.progress = Progress()
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
            "precision": str(self.accelerator.mixed_precision),
            "evaluate_every": self.evaluate_every,
            "seed": self.seed,
        }
        return f"sha256:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"

    def steps(self, index: int) -> int:
        """Optimiser steps of a task."""
        return self.optimization.epochs * self.samples.epoch_steps(index) if self.method.takes_steps(index) else 0

    def task_data(self, index: int) -> TaskData:
        """What a method is told of a task, with how it will train on it."""
        task, rows = self.samples.task_data(index), len(self.samples.of_task(index)[1])
        training = partial(self.optimization.described, rows, self.seed, index) if self.steps(index) else None
        return replace(task, training=training)

    def one_task(self) -> None:
        progress, method = self.progress, self.method
        task = self.task_data(progress.task)
        self.clock = monotonic()
        if not progress.begun:
            start_peak_memory(self.accelerator.device)
            for numbers in (progress.seconds, progress.seconds_evaluation):
                numbers.append(0.0)
            progress.peak_memory.append(0)
            self.evaluate_untrained(task)
            method.begin_task(task)
            progress.trainable_parameters.append(trainable_parameters(method))
            progress.begun = True
            for decision in method.decided():
                if decision["task"] == task.index:
                    self.report({"event": "decision", "run_step": self.starts[task.index], **decision})
        if method.takes_steps(task.index):
            self.train(task)
        method.end_task(task)
        self.tick("seconds")
        progress.stored_numbers.append(stored_numbers(method.state_dict()))
        self.evaluate(task)
        progress.task, progress.step, progress.begun, progress.loss = progress.task + 1, 0, False, 0.0
        progress.recent_loss, progress.recent_steps = 0.0, 0
        self.optimizer = None
        self.save()

    def train(self, task: TaskData) -> None:
        progress, optimization, accelerator = self.progress, self.optimization, self.accelerator
        indices, labels = self.samples.of_task(task.index)
        epoch_steps, steps = self.samples.epoch_steps(task.index), self.steps(task.index)
        if self.optimizer is None:
            self.optimizer = self.new_optimizer()
        training_mode(self.method.model)
        order = torch.empty(0, dtype=torch.int64)
        first = True
        while progress.step < steps:
            epoch, place = divmod(progress.step, epoch_steps)
            if first or place == 0:
                order = epoch_order(len(indices), self.seed, task.index, epoch)
                first = False
            chosen = order[place * optimization.batch_size :][: optimization.batch_size]
            optimization.set_rate(self.optimizer, progress.step, steps)
            batch = self.samples.share(indices, labels, chosen, (self.seed, task.index, epoch))
            loss = take_step(
                self.method,
                self.optimizer,
                optimization,
                batch,
                len(chosen),
                accelerator,
                task=task.index,
                step=progress.step,
            )
            progress.loss += loss
            progress.recent_loss += loss
            progress.recent_steps += 1
            progress.step += 1
            self.tell(task, epoch, place + 1, epoch_steps)
            self.save_if_due()
        accelerator.wait_for_everyone()

    def tell(self, task: TaskData, epoch: int, place: int, epoch_steps: int) -> None:
        """What is due after a step, the `place`-th of its epoch: news of it, of its epoch, an evaluation."""
        progress = self.progress
        run_step = self.starts[task.index] + progress.step
        where = {"task": task.index, "epoch": epoch, "run_step": run_step}
        if self.on_step is not None:
            mean = progress.loss / place
            self.on_step(Step(task.index, epoch, run_step, self.starts[-1], mean))
        if progress.step % self.log_every == 0:
            self.report({"event": "step", **where, "loss": progress.recent_loss / progress.recent_steps})
            progress.recent_loss, progress.recent_steps = 0.0, 0
        if place == epoch_steps:
            self.report({"event": "epoch", **where, "loss": progress.loss / epoch_steps})
            progress.loss = 0.0
        due = self.evaluate_every is not None and progress.step % self.evaluate_every == 0
        if due and progress.step < self.steps(task.index):
            self.evaluate_within(task, where)

    def evaluate_untrained(self, task: TaskData) -> None:
        """Before the first task: what a forward transfer is measured against, where it has the outputs of all."""
        if task.index == 0 and self.method.by_gradient:
            self.progress.accuracy_before_training = self.evaluator.untrained(task)
            self.tick("seconds_evaluation")

    def evaluate_within(self, task: TaskData, where: Mapping[str, int]) -> None:
        self.tick("seconds")
        row = [scores.accuracy for scores in self.evaluator.so_far(task)]
        self.progress.evaluations.append(row)
        self.tick("seconds_evaluation")
        self.report({"event": "evaluation", **where, "accuracy": row})

    def evaluate(self, task: TaskData) -> None:
        progress, rows = self.progress, self.evaluator.so_far(task)
        progress.accuracy_matrix.append([row.class_incremental for row in rows])
        progress.task_incremental_matrix.append([row.task_incremental for row in rows])
        progress.per_class_accuracy.append(per_class(rows, len(self.stream.class_order)))
        progress.calibration_error.append(calibration(rows))
        if self.evaluate_every is not None:
            progress.evaluations.append([row.accuracy for row in rows])
        progress.accuracy_on_next_task.append(self.evaluator.next_task(task))
        self.tick("seconds_evaluation")
        self.report(
            {
                "event": "task",
                "task": task.index,
                "run_step": self.starts[task.index + 1],
                "accuracy": [row.accuracy for row in rows],
                "class_incremental_accuracy": progress.accuracy_matrix[-1],
                "task_incremental_accuracy": progress.task_incremental_matrix[-1],
                "per_class_accuracy": progress.per_class_accuracy[-1],
                "calibration_error": progress.calibration_error[-1],
                "trainable_parameters": progress.trainable_parameters[-1],
                "stored_numbers": progress.stored_numbers[-1],
            }
        )

    def new_optimizer(self) -> torch.optim.Optimizer:
        built = self.optimization.build(self.method.parameter_groups())
        prepared: torch.optim.Optimizer = self.accelerator.prepare_optimizer(built, device_placement=False)
        return prepared

    def report(self, event: dict[str, Any]) -> None:
        self.progress.events.append(event)
        if self.accelerator.is_main_process:
            self.on_event(event)

    def tick(self, spent_on: Literal["seconds", "seconds_evaluation"]) -> None:
        """Add the seconds since the last tick to the task at hand, and take note of its peak memory."""
        now, progress = monotonic(), self.progress
        getattr(progress, spent_on)[-1] += now - self.clock
        self.clock = now
        progress.peak_memory[-1] = max(progress.peak_memory[-1], peak_memory(self.accelerator.device))

    def save_if_due(self) -> None:
        if self.checkpointing is None:
            if self.interrupted:
                raise KeyboardInterrupt
            return
        every = self.checkpointing.steps
        due = every is not None and self.progress.step % every == 0
        if due or self.interrupted or monotonic() - self.last_saved > 60 * self.checkpointing.minutes:
            self.tick("seconds")
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

    def resume(self, until: int) -> None:
        if self.checkpointing is None:
            return
        found = checkpoint_within(self.checkpointing.folder, self.owner, until)
        if found is None:
            return
        _, state = found
        self.progress = Progress(**state["progress"])
        self.method.load_state_dict(state["method"])
        self.method.model.to(self.accelerator.device)
        if state["optimizer"] is not None:
            self.optimizer = self.new_optimizer()
            self.optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"])
        if self.accelerator.is_main_process:
            for event in self.progress.events:
                self.on_event(event)

    def learnt(self) -> Learnt:
        known = {
            one.name: getattr(self.progress, one.name) for one in fields(Learnt) if hasattr(self.progress, one.name)
        }
        return Learnt(**known, peak_memory_definition=peak_memory_definition(self.accelerator.device))

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
