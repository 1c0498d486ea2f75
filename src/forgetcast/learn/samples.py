"""The samples of a stream as a run reads them: what each task trains on, and batches of it on the device."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Generator, Tensor

from forgetcast.learn.evaluate import Read
from forgetcast.learn.seeding import sample_generator
from forgetcast.methods.base import Batch, TaskData
from forgetcast.streams.scenarios import Stream

ReadTraining = Callable[[Int[np.ndarray, " _"], Sequence[Generator]], Tensor]


class Samples:
    """Batches of a stream's training samples.

    Args:
        stream: the tasks.
        read: maps places in the source to inputs; the source's arrays as they are by default.
        read_training: maps places, and for each what it draws from, to inputs, for the batches of steps alone; `read`
            by default.
        joint: whether a task trains on the samples of all tasks so far.
        batch_size: samples a batch, over all processes.
        accelerator: says on which device, and which share of a batch is this process's.
    """

    def __init__(
        self,
        stream: Stream,
        read: Read | None,
        read_training: ReadTraining | None = None,
        *,
        joint: bool,
        batch_size: int,
        accelerator: Accelerator,
    ) -> None:
        self.stream = stream
        self.read = read or _reader(stream)
        self.read_training = read_training
        self.joint = joint
        self.batch_size = batch_size
        self.accelerator = accelerator

    def of_task(self, index: int) -> tuple[Int[np.ndarray, " n"], Int[Tensor, " n"]]:
        """Places in the source and outputs of the samples that task `index` trains on."""
        tasks = self.stream.tasks[: index + 1] if self.joint else self.stream.tasks[index : index + 1]
        indices = np.concatenate([task.train for task in tasks])
        return indices, torch.from_numpy(self.stream.outputs[indices])

    def epoch_steps(self, index: int) -> int:
        """Steps of one epoch of a task."""
        tasks = self.stream.tasks[: index + 1] if self.joint else self.stream.tasks[index : index + 1]
        return -(-sum(len(task.train) for task in tasks) // self.batch_size)

    def task_data(self, index: int) -> TaskData:
        """What a method is told of a task."""
        tasks = self.stream.tasks
        indices, labels = self.of_task(index)
        leaked = {int(output) for task in tasks[: index + 1] for output in np.unique(self.stream.outputs[task.train])}
        seen = tuple(sorted(leaked.union(*(task.classes for task in tasks[: index + 1]))))

        def batches() -> Iterator[Batch]:
            for start in range(0, len(indices), self.batch_size):
                places = torch.arange(start, min(start + self.batch_size, len(indices)))
                yield self._whole_batch(self.read, indices, labels, places)

        return TaskData(index, tasks[index].classes, seen, batches, augmented=self.read_training is not None)

    def share(
        self,
        indices: Int[np.ndarray, " n"],
        labels: Int[Tensor, " n"],
        chosen: Int[Tensor, " b"],
        key: tuple[int, int, int],
    ) -> Batch:
        """This process's share of the batch of the samples `chosen`; the first of them, to be given no weight, if none.

        So every process calls the loss and takes part in what all do alike: draws from a memory, exchanges. With `key`,
        which is seed, task and epoch, a sample is augmented alike whichever process reads it.
        """
        own = chosen[self.accelerator.process_index :: self.accelerator.num_processes]

        def read(places: Int[np.ndarray, " _"]) -> Tensor:
            if self.read_training is None:
                return self.read(places)
            return self.read_training(places, [sample_generator(place, *key) for place in places.tolist()])

        batch = self._whole_batch(read, indices, labels, own if len(own) else chosen[:1])
        return batch if self.accelerator.num_processes == 1 else replace(batch, rows=len(chosen))

    def _whole_batch(
        self, read: Read, indices: Int[np.ndarray, " n"], labels: Int[Tensor, " n"], chosen: Int[Tensor, " b"]
    ) -> Batch:
        places, device = indices[chosen.numpy()], self.accelerator.device
        return Batch(read(places).to(device), labels[chosen].to(device), torch.from_numpy(places).to(device))


def _reader(stream: Stream) -> Read:
    inputs = stream.source.inputs

    def read(indices: Int[np.ndarray, " _"]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(inputs[indices]))

    return read
