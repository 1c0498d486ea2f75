"""Kernels and gaps of a sequence of tasks for a model: any module, several labelled sets of samples."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import require_finite
from forgetcast.forecast.gaps import TaskGaps
from forgetcast.forecast.lazy import lazy_tasks
from forgetcast.forecast.network.samples import Samples, samples_of
from forgetcast.modes import evaluating
from forgetcast.tangent.blocks import TaskKernels
from forgetcast.tangent.features import target_matrix
from forgetcast.tangent.inputs import at, called
from forgetcast.tangent.jacobian import Choice, logits_of, trainable
from forgetcast.tangent.kernel import MEMORY, joint_kernel
from forgetcast.tangent.passes import common_type

CHUNK = 256
"""Samples that go through the model together to read its outputs."""


def task_kernels(
    model: nn.Module,
    tasks: Sequence[Any],
    *,
    trace: bool = False,
    parameters: Choice = None,
    outputs: Callable[[Any], Tensor] | None = None,
    probes: int | None = None,
    seed: int = 0,
    chunk: int | None = None,
    memory: float = MEMORY,
) -> TaskKernels:
    r"""Every intra- and inter-task block of a model's tangent kernel, at its parameters as they are now.

        K_st[i, c, j, d] = <d f_c(x_i) / d theta, d f_d(x_j) / d theta>,      x_i of task s, x_j of task t

    Before and after a training they are two calls; `before.shift(after)` says how far each block moved.

    Args:
        model: any module whose outputs for a sample do not depend on the other samples. It is left as it was.
        tasks: samples of each task: (inputs, targets), a mapping with "labels", a loader of such batches, or a tensor
            of inputs. Some dozens of each are enough.
        trace: one number a pair of samples, the mean over equal outputs: exact for a linear head, where all outputs
            share it, and an approximation elsewhere; c^2 times smaller than the full kernel.
        parameters: that train: names, a filter of (name, parameter), or None for all that require gradients.
        outputs: from what the model returns to (samples, C); by default the tensor itself, or its `logits`.
        probes: random directions that stand for the outputs in the trace kernel, see `trace_kernel`.
        seed: of the probes.
        chunk: samples that go through the model together.
        memory: bytes that may be kept.

    Raises:
        ValueError: no tasks; what does not fit the model; a kernel larger than `memory`.

    Cost: 1 + 1.1 C passes forward for every sample, and the products of all pairs.

    Examples:
        >>> import torch, forgetcast as fc
        >>> _ = torch.manual_seed(0)
        >>> head = torch.nn.Linear(4, 3)
        >>> tasks = [(torch.randn(n, 4), torch.randint(0, 3, (n,))) for n in (6, 8)]
        >>> kernels = fc.task_kernels(head, tasks, trace=True)
        >>> kernels.matrix(0, 1).shape, 0 < kernels.overlap(0, 1) < 1
        (torch.Size([6, 8]), True)
    """
    chosen = trainable(model, parameters)
    device = next(iter(chosen.values())).device
    sets = [samples_of(f"task {place}", task).to(device).inputs for place, task in enumerate(tasks)]
    rows = joint_kernel(
        model,
        sets,
        trace=trace,
        parameters=chosen,
        outputs=outputs,
        probes=probes,
        seed=seed,
        chunk=chunk,
        memory=memory,
    )
    return TaskKernels.of_rows(rows, torch.finfo(common_type(chosen.values())).eps)


def task_gaps(
    model: nn.Module,
    tasks: Sequence[Any],
    penalty: float,
    *,
    trace: bool = False,
    parameters: Choice = None,
    outputs: Callable[[Any], Tensor] | None = None,
    probes: int | None = None,
    seed: int = 0,
    chunk: int | None = None,
    memory: float = MEMORY,
) -> TaskGaps:
    r"""The gaps of a sequence of tasks for a model, before the first is trained: squared loss, tangent of the start.

    Args:
        model: as it is before the first task, with the outputs of all tasks.
        tasks: in training order, labelled samples of each: (inputs, targets), a mapping with "labels", or a loader.
            Targets are labels (n,) or values (n, C).
        penalty: p of `1/2 ||f(X_k) - Y_k||^2 + p/2 ||theta - theta_start||^2`, which each task minimises.
        trace: as for `task_kernels`; exact for a linear head.
        parameters: as for `task_kernels`.
        outputs: as for `task_kernels`.
        probes: as for `task_kernels`.
        seed: of the probes.
        chunk: as for `task_kernels`.
        memory: as for `task_kernels`.

    Raises:
        ValueError: as for `task_kernels`; tasks without targets, or with targets that do not fit the outputs.

    Cost: that of `task_kernels`, one pass forward, and an eigen-decomposition a task.

    Examples:
        >>> import torch, forgetcast as fc
        >>> _ = torch.manual_seed(0)
        >>> head = torch.nn.Linear(8, 4)
        >>> tasks = [(torch.randn(20, 8) + shift, torch.randint(0, 4, (20,))) for shift in (0, 1, 2)]
        >>> gaps = fc.task_gaps(head, tasks, penalty=1.0, trace=True)
        >>> bool((gaps.table["end"] <= gaps.table["bound"]).all()), len(gaps.pairs)
        (True, 3)
    """
    sets = [samples_of(f"task {place}", task) for place, task in enumerate(tasks)]
    kernels = task_kernels(
        model,
        sets,
        trace=trace,
        parameters=parameters,
        outputs=outputs,
        probes=probes,
        seed=seed,
        chunk=chunk,
        memory=memory,
    )
    device = next(iter(trainable(model, parameters).values())).device
    read = logits_of if outputs is None else outputs
    residuals = [_residual(model, part.to(device), read, chunk or CHUNK) for part in sets]
    return TaskGaps(lazy_tasks(kernels, residuals, penalty))


def _residual(model: nn.Module, part: Samples, read: Callable[[Any], Tensor], chunk: int) -> Float[Tensor, "n C"]:
    """Outputs minus targets."""
    with evaluating(model), torch.no_grad():
        pieces = [
            read(called(model, at(part.inputs, slice(start, start + chunk)))) for start in range(0, len(part), chunk)
        ]
    outputs = torch.cat(pieces).double()
    require_finite(f"{part.name}: outputs", outputs)
    return outputs - target_matrix(part.name, part.targets, outputs.shape[1], outputs)
