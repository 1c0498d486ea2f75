"""One optimiser step, on one process or many, and what would silently go wrong in it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from accelerate import Accelerator

from forgetcast.checks import complaint
from forgetcast.learn.attention import PlainAttention
from forgetcast.learn.casts import CastOnce
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Batch, Method


def take_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    optimization: Optimization,
    batch: Batch,
    rows: int,
    accelerator: Accelerator,
    *,
    task: int,
    step: int,
) -> float:
    """One step on this process's share of a batch of `rows` samples; the loss over the whole batch.

    The loss is read from the device, which waits for it; nothing else does.

    Args:
        method: gives the loss and has the hooks.
        optimizer: of the task.
        optimization: says how gradients are clipped.
        batch: this process's share; one sample without weight where it has none.
        rows: samples of the whole batch.
        accelerator: backward, and sums over processes.
        task: named in errors.
        step: within the task; at the first one every trainable parameter must have a gradient.

    Raises:
        ValueError: a loss that is not finite, a trainable parameter that the loss does not reach.
    """
    optimizer.zero_grad()
    share = len(range(accelerator.process_index, rows, accelerator.num_processes)) / rows
    with precision_of(accelerator):
        loss = method.loss(batch) * share
    accelerator.backward(loss)
    value = loss.detach()
    if accelerator.num_processes > 1:
        value = accelerator.reduce(value, "sum")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = accelerator.reduce(gradient, "sum")
    number = float(value)
    if not np.isfinite(number):
        raise complaint(
            f"the loss of task {task} is {number} at step {step}",
            "a finite loss",
            "Lower the learning rate, or look for NaN in the inputs.",
        )
    if step == 0:
        require_reached(method, optimizer)
    method.after_backward()
    optimization.clip(optimizer)
    optimizer.step()
    method.after_step()
    return number


@contextmanager
def precision_of(accelerator: Accelerator) -> Iterator[None]:
    """The precision of the accelerator; in bfloat16 with what makes it faster."""
    with accelerator.autocast(), ExitStack() as faster:
        if accelerator.mixed_precision == "bf16":
            faster.enter_context(PlainAttention())
            faster.enter_context(CastOnce())
        yield


def require_reached(method: Method, optimizer: torch.optim.Optimizer) -> None:
    """Raise if a trainable parameter has no gradient: it would silently never train."""
    names = {id(parameter): name for name, parameter in method.model.named_parameters()}
    lost = [
        names.get(id(parameter), "a parameter outside the model")
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is None
    ]
    if lost:
        raise complaint(
            f"the loss does not reach {lost}",
            "a gradient for every trainable parameter",
            "Freeze what is not used (requires_grad_(False)), or put it on the path of the loss.",
        )


def require_precision(accelerator: Accelerator) -> None:
    """Raise if the accelerator scales losses: gradients would reach the method's hooks scaled."""
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise complaint(
            f"got mixed precision {accelerator.mixed_precision}",
            "bf16, or none",
            "Use bf16, which has the range of float32 and needs no scale of the loss.",
        )
