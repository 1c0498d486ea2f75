"""The methods with prompts on a small transformer, and the tasks of digits, for their tests."""

import numpy as np
import torch
from digit_tasks import task_of
from small import stream
from torch import Tensor
from tuned import Transformer

from forgetcast.methods.base import Batch, Method
from forgetcast.methods.registry import create

WIDTH = 20
OPTIONS = {
    "l2p": {"size": 6, "length": 2, "count": 2},
    "dualprompt": {"general": 3, "expert": 2, "general_layers": (0,), "expert_layers": (1,)},
    "coda_prompt": {"components": 4, "length": 2, "layers": (0, 1), "orthogonality": 0.1},
}


def method(name: str, **options) -> Method:
    torch.manual_seed(4)
    return create(name, Transformer(WIDTH), WIDTH, **{**OPTIONS[name], **options})


def step(made: Method, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    made.loss(batch).backward()
    made.after_backward()
    optimizer.step()
    made.after_step()


def optimizer_of(made: Method) -> torch.optim.Optimizer:
    """With all that could move what should stand still."""
    return torch.optim.AdamW(made.parameter_groups(), lr=0.02, weight_decay=0.1)


def train(made: Method, index: int, steps: int = 3) -> Method:
    task = task_of(index)
    made.begin_task(task)
    made.model.train()
    optimizer = optimizer_of(made)
    for batch, _ in zip(task.batches(), range(steps), strict=False):
        step(made, batch, optimizer)
    made.end_task(task)
    return made


def trained(name: str, tasks: int, **options) -> Method:
    made = method(name, **options)
    for index in range(tasks):
        train(made, index)
    return made


def questions() -> Tensor:
    return torch.from_numpy(stream().source.inputs[np.concatenate([task.test for task in stream().tasks])])
