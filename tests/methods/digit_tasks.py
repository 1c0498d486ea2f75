"""Tasks of the small stream of digits, as a method is given them."""

import torch
from small import stream
from torch import Tensor

from forgetcast.methods.base import Batch, TaskData


def samples(index: int) -> tuple[Tensor, Tensor]:
    rows = stream()[index].train
    return torch.from_numpy(stream().source.inputs[rows]), torch.from_numpy(stream().outputs[rows])


def task_of(index: int, size: int = 32) -> TaskData:
    inputs, labels = samples(index)

    def batches():
        for places in torch.arange(len(labels)).split(size):
            yield Batch(inputs[places], labels[places], places)

    seen = tuple(output for task in stream().tasks[: index + 1] for output in task.classes)
    return TaskData(index, stream()[index].classes, seen, batches)
