r"""Where a network's old outputs move most easily: probes of a finished task, and the leading modes of their kernel.

K = J J^T = U diag(l) U^T,      J = d f(probes) / d theta      (n c x P)
"""

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.heads.linear import Linear
from forgetcast.methods.base import Model, TaskData
from forgetcast.modes import evaluating
from forgetcast.tangent.jacobian import jacobian, trainable
from forgetcast.tangent.leading import leading_modes
from forgetcast.tangent.operator import TangentOperator
from forgetcast.tangent.products import Tangent, TangentMatrix

MEMORY = 2**30
"""Bytes that a Jacobian may take as a matrix."""

DENSE = 1500
"""Up to that many outputs on all probes, all eigenvectors of a kernel are found in a few seconds."""


def balanced_probes(task: TaskData, count: int, seed: int = 0) -> Float[Tensor, " n *shape"]:
    """Inputs of up to `count` training samples, as equally many of each label as there are.

    Args:
        task: reads its samples.
        count: how many; more than there are means all.
        seed: of the choice, which is a function of it, the labels and the task's index.

    Raises:
        ValueError: a task without samples.

    Cost: two readings of the task.
    """
    labels = torch.cat([batch.labels.cpu() for batch in task.batches()] or [torch.zeros(0, dtype=torch.int64)])
    if len(labels) == 0:
        raise complaint("a task without samples", "at least one", "Let `TaskData.batches` read the task.")
    generator = torch.Generator().manual_seed(seed + 1_000_003 * task.index)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    by_label = shuffled.argsort(stable=True)
    sizes = torch.bincount(shuffled)
    turn = torch.empty_like(order)  # a sample is the turn-th of its label
    turn[by_label] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[shuffled[by_label]]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[order[turn.argsort(stable=True)[:count]]] = True
    parts, first = [], 0
    for batch in task.batches():
        own = chosen[first : first + len(batch.labels)]
        parts.append(batch.inputs[own.to(batch.inputs.device)])
        first += len(batch.labels)
    return torch.cat(parts)


def comparable_logits(model: Model, inputs: Float[Tensor, " n *shape"]) -> Float[Tensor, "n C"]:
    """Logits in evaluation mode and without autocast, so that they compare from step to step."""
    with evaluating(model), torch.autocast(inputs.device.type, enabled=False):
        logits: Tensor = model(inputs)
    return logits


def tangent_of(
    model: Model, inputs: Float[Tensor, " n *shape"], outputs: Sequence[int], *, memory: float = MEMORY
) -> Tangent:
    """J of some outputs with respect to all that trains: a matrix in float64 where it is small, else an operator.

    Args:
        model: as it is now.
        inputs: of the probes.
        outputs: those that count.
        memory: bytes of a matrix.

    Raises:
        ValueError: nothing trains, or the outputs do not depend on it.

    Cost: of the matrix, that of `jacobian`; of the operator, little.
    """
    parameters = trainable(model)
    kept = list(outputs)
    if 8 * len(inputs) * len(kept) * sum(parameter.numel() for parameter in parameters.values()) <= memory:
        matrix = jacobian(model, inputs, parameters, lambda logits: logits[:, kept], dtype=torch.float64)
        with torch.no_grad():
            return TangentMatrix(matrix, comparable_logits(model, inputs)[:, kept])
    return TangentOperator(model, inputs, dict(parameters), lambda logits: logits[:, kept])


def tangent_of_later(model: Model, inputs: Float[Tensor, " n *shape"]) -> TangentMatrix:
    """J of one output that is yet to come, with respect to its own row of a linear head: the features, and a 1 for b.

    Its row is zero, so that nothing else moves it to first order.

    Raises:
        ValueError: a head that is not linear, whose new rows are not zero.
    """
    if not isinstance(model.head, Linear):
        raise complaint(
            f"later outputs to be held of a {type(model.head).__name__} head",
            "a linear head, whose new outputs start at zero",
            "Set later='free', or use a linear head.",
        )
    with torch.no_grad(), evaluating(model):
        phi = model.features(inputs).double()
    if model.head.bias is not None:
        phi = torch.cat([phi, torch.ones_like(phi[:, :1])], 1)
    return TangentMatrix(phi, torch.zeros_like(phi[:, :1]))


def vulnerable_modes(tangent: Tangent, k: int) -> Float[Tensor, "k n c"]:
    """The k leading eigenvectors of `J J^T`, orthonormal, float64; all directions where there are no more than k.

    Warns where the eigensolver stopped short: the modes are still orthonormal, but not quite the leading ones.

    Args:
        tangent: J of the probes.
        k: how many.

    Cost: `(n c)^2 P + 10 (n c)^3` from a matrix of up to `DENSE` rows; else some 4 to 8 products with the kernel for
    each mode.
    """
    n, c = tangent.samples, tangent.outputs
    device = tangent.value().device
    if k >= n * c:
        return torch.eye(n * c, dtype=torch.float64, device=device).view(-1, n, c)
    if isinstance(tangent, TangentMatrix) and n * c <= DENSE:
        J = tangent.matrix.double()
        top: Tensor = torch.linalg.eigh(J @ J.T).eigenvectors[:, -k:].flip(1)
        return top.T.reshape(k, n, c)
    found = leading_modes(tangent.kernel, (n, c), k, block=c, device=device)
    if not found.converged:
        warnings.warn(
            f"after {found.products} products the {k} modes have residuals up to {float(found.residuals.max()):.1g}, "
            f"beside a largest eigenvalue of {float(found.values[0]):.1g}: ask for fewer modes",
            stacklevel=2,
        )
    return found.vectors
