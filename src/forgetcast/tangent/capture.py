"""What a forward pass leaves for reverse mode: the input of every layer that owns parameters, and where its output is.

Nothing is copied and no weight gradient is computed: `torch.autograd.grad` is asked for the gradient at the recorded
places of the graph, so that frozen weights cost nothing and fused attention works.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from forgetcast.checks import complaint


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a layer inside a forward pass.

    Attributes:
        layer: name of the layer's type, for messages.
        given: its input, detached.
        version: how often that memory had been written to when the layer read it.
        edge: the place of its output in the graph; writing into the output later does not move it.
        shape: of the output.
    """

    layer: str
    given: Tensor
    version: int
    edge: GradientEdge
    shape: torch.Size

    def input(self) -> Tensor:
        """The input as the layer saw it.

        Raises:
            ValueError: it has been overwritten since, which autograd would refuse as well.
        """
        if self.given._version != self.version:
            raise complaint(
                f"an input of a {self.layer}, shape {tuple(self.given.shape)}, overwritten after the layer read it",
                "inputs that are left alone, as the layer's own backward pass expects",
                "Write `x = x + y` in place of `x += y` in the model.",
            )
        return self.given


@contextmanager
def recording(layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[Use]]]:
    """Every use of `layers` inside, in order. The hooks are gone afterwards, also after an error."""
    uses: dict[nn.Module, list[Use]] = {layer: [] for layer in layers}

    def keep(layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = positional[0] if positional else next(iter(named.values()), None)
        if isinstance(output, Tensor) and output.requires_grad and isinstance(given, Tensor):
            place = get_gradient_edge(output)
            uses[layer].append(Use(type(layer).__name__, given.detach(), given._version, place, output.shape))

    # first among forward hooks: a user's hook may replace the output
    handles = [layer.register_forward_hook(keep, prepend=True, with_kwargs=True) for layer in uses]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def requiring(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only `parameters` require gradients inside, so that no graph is kept for the others; restored after."""
    chosen = {id(parameter) for parameter in parameters}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def paths_to(roots: Tensor, parameters: Iterable[nn.Parameter]) -> tuple[dict[int, int], set[Any]]:
    """How many operations of the graph under `roots` read each parameter (by `id`), and all nodes of the graph."""
    readers = {id(parameter): 0 for parameter in parameters}
    seen: set[Any] = set()
    waiting = [roots.grad_fn] if roots.grad_fn is not None else []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for below, _ in node.next_functions:
            if below is None:
                continue
            variable = getattr(below, "variable", None)
            if variable is not None and id(variable) in readers:
                readers[id(variable)] += 1
            waiting.append(below)
    return readers, seen
