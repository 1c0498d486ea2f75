"""Per-sample gradients of parameters that no rule covers: right for any module, at the price of further passes.

Two ways. `vectorised` runs the model once under `torch.func.vmap`; `looped` runs it once a sample with plain autograd,
which nothing can fool. Which one a parameter takes is decided by trying the first against the second.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from forgetcast.tangent.inputs import arguments, at, called, sample_count, transformed

Heads = Callable[[Any, slice], Tensor]
"""(outputs of the model for a chunk, places of its samples) -> (n, c) numbers to differentiate."""


def looped(
    model: nn.Module, inputs: Any, parameters: Mapping[str, nn.Parameter], heads: Heads, first: int = 0
) -> dict[str, Float[Tensor, "n c _"]]:
    """One forward pass a sample and one backward pass a sample and number.

    Args:
        model: in evaluation mode.
        inputs: of the chunk.
        parameters: those asked for.
        heads: the numbers to differentiate.
        first: place of the chunk's first sample.
    """
    samples: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(sample_count(inputs)):
        values = heads(called(model, at(inputs, slice(i, i + 1))), slice(first + i, first + i + 1))
        rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
        for c in range(values.shape[1]):
            found = gradients(values[0, c], list(parameters.values()))
            for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
                rows[name].append(torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten())
        for name in parameters:
            samples[name].append(torch.stack(rows[name]))
    return {name: torch.stack(parts) for name, parts in samples.items()}


def vectorised(
    model: nn.Module, inputs: Any, parameters: Mapping[str, nn.Parameter], outputs: Any, values: Callable[[Any], Tensor]
) -> dict[str, Float[Tensor, "n c _"]]:
    """One forward pass and c backward passes of all samples together, each sample seen alone by the model.

    Attention runs without its fused kernels, for which `vmap` has no rule.

    Args:
        model: in evaluation mode.
        inputs: of the chunk.
        parameters: those asked for, by their names in the model.
        outputs: of the model for the chunk, from an ordinary pass.
        values: from such outputs to the (n, c) numbers.
    """
    leaves, shape = tree_flatten(outputs)
    wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    # cut from the graph, so that one output that feeds another is not counted twice
    free = [leaf.detach().requires_grad_() if i in wanted else leaf for i, leaf in enumerate(leaves)]
    numbers = values(tree_unflatten(free, shape))
    cotangents = []
    for c in range(numbers.shape[1]):
        found = gradients(numbers[:, c].sum(), [free[i] for i in wanted])
        cotangents.append([torch.zeros_like(free[i]) if g is None else g for i, g in zip(wanted, found, strict=True)])
    stacked = [torch.stack(parts, 1) for parts in zip(*cotangents, strict=True)]  # n c ...

    def pulled(sample: Any, directions: list[Tensor]) -> dict[str, Tensor]:
        def forward(given: dict[str, Tensor]) -> list[Tensor]:
            result = functional_call(model, given, *arguments(transformed(sample, lambda x: x[None])))
            flat = tree_flatten(result)[0]
            return [flat[i][0] for i in wanted]

        pull = vjp(forward, {name: parameter.detach() for name, parameter in parameters.items()})[1]
        rows: dict[str, Tensor] = vmap(lambda direction: pull(direction)[0])(directions)
        return rows

    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        jacobians = vmap(pulled)(transformed(inputs, lambda x: x), stacked)
    return {name: rows.reshape(*rows.shape[:2], -1).detach() for name, rows in jacobians.items()}


def gradients(value: Tensor, places: Sequence[Any]) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` with the graph kept; None where nothing is reached."""
    if not value.requires_grad or not places:
        return [None] * len(places)
    return torch.autograd.grad(value, list(places), retain_graph=True, allow_unused=True)
